"""What a config.json says about a language model that the Qwen2 of this package does not compute.

Shapes of tensors do not show these settings, and ignoring one gives another model without an error. So each is refused
by name. Other settings that nobody here knows are named in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from framestream.pipeline.config.model import LanguageModelConfig
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.utils.command_line import printable_line

MODEL_TYPES = ("qwen2", "llava_qwen", "videochat_flash_qwen")  #: of Qwen2, alone or in a model with vision

logger = logging.getLogger(__name__)


def _is_off(value: Any) -> bool:
    return value is None or value is False or value == 0 or value in ("", [], {})


def _is_one(value: Any) -> bool:
    return value is None or (not isinstance(value, bool) and value == 1)


def _is_plain_rope(value: Any) -> bool:
    if value is None:
        return True
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    kinds = isinstance(value, dict) and [value.get(name, "default") for name in ("rope_type", "type")]
    return kinds == ["default"] * 2 and value.keys() <= known and _is_one(value.get("partial_rotary_factor"))


#: field -> which of its values give the model that is computed here; absent fields do
_SUPPORTED: dict[str, Callable[[Any], bool]] = {
    "hidden_act": lambda value: value in (None, "silu"),
    "attention_bias": lambda value: value in (None, True),
    "qkv_bias": lambda value: value in (None, True),
    "rope_scaling": _is_plain_rope,
    "rope_parameters": _is_plain_rope,
    "is_causal": lambda value: value in (None, True),
    **dict.fromkeys(
        (
            "attention_dropout",
            "hidden_dropout",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "mlp_bias",
            "o_bias",
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_intermediate_size",
            "qk_norm",
            "use_qk_norm",
            "use_mrope",
            "mrope_section",
            "no_rope_layers",
            "attention_chunk_size",
            "quantization_config",
            "compression_config",
            "parallel_attn",
            "alibi",
            "add_cross_attention",
            "is_encoder_decoder",
        ),
        _is_off,
    ),
    **dict.fromkeys(
        (
            "partial_rotary_factor",
            "rotary_pct",
            "logit_scale",
            "logits_scaling",
            "embedding_multiplier",
            "residual_multiplier",
            "attention_multiplier",
            "scale_emb",
            "scale_depth",
            "pretraining_tp",
        ),
        _is_one,
    ),
}
#: fields that Qwen2's files have and that do not change the model, or that the checks below read
_HARMLESS = {
    *("architectures", "model_type", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache", "max_window_layers"),
    *("use_sliding_window", "sliding_window", "layer_types", "head_dim", "dual_chunk_attention_config"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "chunk_size_feed_forward"),
    *("output_attentions", "output_hidden_states", "return_dict", "is_decoder", "problem_type", "id2label", "label2id"),
    *("tokenizer_model_max_length", "unsloth_version", "unsloth_fixed", "cross_attention_hidden_size"),
}


def describe_unsupported(config: Mapping[str, Any]) -> list[str]:
    """List the fields of a config.json of Qwen2 that describe another model than the one computed here.

    Returns:
        one text for each, such as ``hidden_act is 'gelu'``.
    """
    faults = []
    if (kind := config.get("model_type")) is not None and kind not in MODEL_TYPES:
        faults.append(_describe("model_type", kind))
    given = {name: config[name] for name in _SUPPORTED if name in config}
    faults += [_describe(name, value) for name, value in given.items() if not _SUPPORTED[name](value)]
    rope = config.get("rope_parameters")
    if (
        isinstance(rope, dict)
        and "rope_theta" in rope
        and config.get("rope_theta", rope["rope_theta"]) != rope["rope_theta"]
    ):
        faults.append(f"{_describe('rope_theta', config['rope_theta'])} and {_describe('rope_parameters', rope)}")
    return faults + _attention_faults(config)


def _attention_faults(config: Mapping[str, Any]) -> list[str]:
    """Check which layers attend to a window, and the width of heads."""
    faults = []
    layers, types = config.get("num_hidden_layers"), config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
            faults.append(_describe("layer_types", types))
    elif config.get("use_sliding_window") and config.get("sliding_window") is not None:
        first = config.get("max_window_layers", 28)  # transformers' default
        if not isinstance(first, int) or not isinstance(layers, int) or first < layers:
            faults.append(_describe("use_sliding_window", config["use_sliding_window"]))
    width, heads, head = config.get("hidden_size"), config.get("num_attention_heads"), config.get("head_dim")
    if head is not None and isinstance(width, int) and isinstance(heads, int) and heads > 0 and head != width // heads:
        faults.append(_describe("head_dim", head))
    return faults


def unknown_fields(config: Mapping[str, Any]) -> list[str]:
    """List the fields of a config.json of Qwen2 that have no meaning here, and may have one elsewhere."""
    known = {*_HARMLESS, *_SUPPORTED, *to_dict(LanguageModelConfig())}
    return [printable_line(name) for name in sorted(config) if name not in known and not _is_off(config[name])]


def log_unknown_fields(path: Path, config: Mapping[str, Any]) -> None:
    """Log a warning about the fields of a config.json of Qwen2 that are not used."""
    if unknown := unknown_fields(config):
        listed = ", ".join(unknown[:10]) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
        logger.warning("%s: fields that are not known here and not used: %s", path, listed)


def _describe(name: str, value: Any) -> str:
    return f"{name} is {printable_line(repr(value))}"
