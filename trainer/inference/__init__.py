"""Ask a trained model about videos and images from Python.

    from framestream.trainer.inference import Conversation, MediaFile, Predictor, resolve_run

    predictor = Predictor(*resolve_run("runs/stage4"))
    conversation = Conversation(predictor, [MediaFile("clip.mp4", start=12.4, end=27.9)])
    for piece in conversation.ask("What happens?"):
        print(piece, end="", flush=True)

Files are decoded, sampled, resized and encoded as in a build, so the model sees what it would see of them in shards.
Names are imported when first used: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from framestream.pipeline.shards.memory_index import MediaFile
    from framestream.trainer.inference.chat_session import ChatSession, stream_text
    from framestream.trainer.inference.contact_sheet import write_contact_sheet
    from framestream.trainer.inference.conversation import Conversation
    from framestream.trainer.inference.generation import Sampling, generate, prefill
    from framestream.trainer.inference.likelihood import LogLikelihood, loglikelihood
    from framestream.trainer.inference.predictor import Predictor, resolve_run
    from framestream.trainer.inference.vision_cache import VisionFeatureCache
    from framestream.trainer.inference.vision_stream import StreamEncoder

__all__ = [
    "ChatSession",
    "Conversation",
    "LogLikelihood",
    "MediaFile",
    "Predictor",
    "Sampling",
    "StreamEncoder",
    "VisionFeatureCache",
    "generate",
    "loglikelihood",
    "prefill",
    "resolve_run",
    "stream_text",
    "write_contact_sheet",
]

#: public name -> module that defines it
_HOMES = {
    "ChatSession": "framestream.trainer.inference.chat_session",
    "Conversation": "framestream.trainer.inference.conversation",
    "LogLikelihood": "framestream.trainer.inference.likelihood",
    "MediaFile": "framestream.pipeline.shards.memory_index",
    "Predictor": "framestream.trainer.inference.predictor",
    "Sampling": "framestream.trainer.inference.generation",
    "StreamEncoder": "framestream.trainer.inference.vision_stream",
    "VisionFeatureCache": "framestream.trainer.inference.vision_cache",
    "generate": "framestream.trainer.inference.generation",
    "loglikelihood": "framestream.trainer.inference.likelihood",
    "prefill": "framestream.trainer.inference.generation",
    "resolve_run": "framestream.trainer.inference.predictor",
    "stream_text": "framestream.trainer.inference.chat_session",
    "write_contact_sheet": "framestream.trainer.inference.contact_sheet",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
