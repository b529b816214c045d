"""Hugging Face video processors without downloads: a byte tokenizer, small images, and their chat templates."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.helpers.model.torchvision_import import import_torchvision

MARKS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "<image>", "<video>"),
)
#: As the released Qwen2.5-VL and Qwen3-VL word chats, without their default system message.
QWEN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: As LLaVA-OneVision and LLaVA-NeXT-Video (Qwen2) do.
LLAVA = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'video') %}<{{ part['type'] }}>{% endif %}{% endfor %}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: As SmolVLM2 does. Its processor has the same template with videos, and takes that one for chats with videos.
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
SMOLVLM_MARKS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


def tokenizer(*more: str) -> Any:
    """Return a tokenizer with a token for each byte, each placeholder and each of ``more``."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS + more])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def processor(name: str) -> Any:
    """Return a processor for small images, created without files.

    ``name`` is ``qwen2_5_vl``, ``qwen3_vl``, ``llava_next_video``, ``llava_onevision`` or ``smolvlm2``.
    """
    import_torchvision()
    import transformers as hf

    pixels = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112 * 64}
    if name == "qwen2_5_vl":
        video = hf.Qwen2VLVideoProcessor(size=pixels, cap_pixels_per_frame=False)
        image = hf.Qwen2VLImageProcessor(size=pixels)
        return hf.Qwen2_5_VLProcessor(image, tokenizer(), video, chat_template=QWEN)
    if name == "qwen3_vl":
        video = hf.Qwen3VLVideoProcessor(size=pixels, cap_pixels_per_frame=False)
        image = hf.Qwen2VLImageProcessor(size=pixels, patch_size=16)
        return hf.Qwen3VLProcessor(image, tokenizer(), video, chat_template=QWEN)
    if name == "smolvlm2":
        sizes = {"max_image_size": {"longest_edge": 56}}
        video = hf.SmolVLMVideoProcessor(size={"longest_edge": 56}, **sizes, num_frames=64, fps=1)
        image = hf.SmolVLMImageProcessor(size={"longest_edge": 112}, **sizes)
        return hf.SmolVLMProcessor(image, tokenizer(*SMOLVLM_MARKS), video, image_seq_len=4, chat_template=SMOLVLM)
    square, grid = {"height": 56, "width": 56}, [[56, 112], [112, 56], [112, 112]]
    if name == "llava_next_video":
        crop = {"size": {"shortest_edge": 56}, "crop_size": square}
        return hf.LlavaNextVideoProcessor(
            hf.LlavaNextVideoVideoProcessor(**crop),
            hf.LlavaNextImageProcessor(image_grid_pinpoints=grid, **crop),
            tokenizer(),
            chat_template=LLAVA,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    video = hf.LlavaOnevisionVideoProcessor(size=square)
    image = hf.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=grid)
    return hf.LlavaOnevisionProcessor(
        image, tokenizer(), video, num_image_tokens=16, vision_feature_select_strategy="full", chat_template=LLAVA
    )
