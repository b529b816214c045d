"""Entry point of the plug-in, which vLLM calls in each of its processes.

vLLM finds :func:`register` by the group ``vllm.general_plugins``. Only vLLM imports this room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoProcessor
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers.registry import TokenizerRegistry

from framestream.trainer.standalone.configuration_framestream import FramestreamConfig
from framestream.trainer.standalone.processing_framestream import FramestreamProcessor

if TYPE_CHECKING:
    from vllm.config import ModelConfig

ARCHITECTURE = "FramestreamForCausalLM"  #: in config.json of an export
MODE = "framestream"  #: vLLM's name of a tokenizer with its way to write prompts
ROOM = "framestream.trainer.vllm_plugin"


class ChatMode(VerifyAndUpdateConfig):
    """Chooses our renderer for our models."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Set ``tokenizer_mode``.

        Raises:
            ValueError: another one is set; its prompts are not those of training.
        """
        if model_config.tokenizer_mode not in ("auto", MODE):
            raise ValueError(f"tokenizer_mode is {model_config.tokenizer_mode!r}; this model has its own: leave it out")
        model_config.tokenizer_mode = MODE


def register() -> None:
    """Register configuration, processor, model and renderer; vLLM imports the last two when it needs them."""
    if MODE in RENDERER_REGISTRY.renderers:
        return
    AutoConfig.register(FramestreamConfig.model_type, FramestreamConfig, exist_ok=True)
    AutoProcessor.register(FramestreamConfig, FramestreamProcessor, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"{ROOM}.model:FramestreamForVLLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ChatMode
    TokenizerRegistry.register(MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.register(MODE, f"{ROOM}.renderer", "FramestreamRenderer")
