"""Video language models of other families with random weights, small enough to be trained in a test."""

from __future__ import annotations

from typing import Any

from tests.helpers.model.processors import SMOLVLM_MARKS
from tests.helpers.model.torchvision_import import import_torchvision

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 265,
    "max_position_embeddings": 8192,
}
QWEN_IDS = {"image_token_id": 261, "video_token_id": 262, "vision_start_token_id": 259, "vision_end_token_id": 260}


def chat_model(name: str) -> Any:
    """Return a model for the processor of the same ``name`` in :mod:`tests.helpers.model.processors`."""
    import_torchvision()
    import torch
    import transformers as hf

    torch.manual_seed(0)
    sections = {"type": "default", "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    tower = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64}
    if name == "qwen2_5_vl":
        config = hf.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": sections},
            vision_config={**tower, "fullatt_block_indexes": [1]},
            **QWEN_IDS,
        )
        return hf.Qwen2_5_VLForConditionalGeneration(config)
    if name == "qwen3_vl":
        text = {**TEXT, "head_dim": 16, "rope_parameters": {**sections, "mrope_interleaved": True}}
        vision = {**tower, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
        return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS))
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "smolvlm2":
        text = {**TEXT, "model_type": "llama", "vocab_size": TEXT["vocab_size"] + len(SMOLVLM_MARKS)}
        vision = {**vision, "image_size": 56, "patch_size": 14}
        config = hf.SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=2, image_token_id=263)
        return hf.SmolVLMForConditionalGeneration(config)
    if name == "llava_next_video":
        config = hf.LlavaNextVideoConfig(
            text_config={**TEXT, "model_type": "llama"},
            vision_config={**vision, "model_type": "clip_vision_model", "image_size": 56, "patch_size": 14},
            image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
            image_token_index=263,
            video_token_index=264,
        )
        return hf.LlavaNextVideoForConditionalGeneration(config)
    config = hf.LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**vision, "model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14},
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
        image_token_id=263,
        video_token_id=264,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)
