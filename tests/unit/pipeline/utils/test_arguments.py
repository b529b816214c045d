"""Unknown keyword arguments are refused with the nearest name, in functions and in the plug-in of lmms-eval."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest

from framestream.pipeline import build_loader
from framestream.pipeline.adapters import ChatCollator, chats, read_members
from framestream.pipeline.utils.arguments import refuse_unknown_arguments


class Example:
    @refuse_unknown_arguments
    def __init__(self, frames: int, *, split: str = "train") -> None:
        self.values = frames, split


def test_known_arguments_pass_and_others_are_named():
    assert Example(3, split="val").values == Example(frames=3, split="val").values == (3, "val")
    with pytest.raises(TypeError, match="^Example: unknown argument frame; did you mean frames.$"):
        Example(frame=3)
    with pytest.raises(TypeError, match="^Example: unknown argument zzz; known: frames, split$"):
        Example(3, zzz=1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'frames'"):
        Example()


@pytest.mark.parametrize(
    ("call", "nearest"),
    [
        (lambda: build_loader(None, world=2), "world_size"),
        (lambda: read_members({}, frame=2), "frames"),
        (lambda: chats(None, time_mesage="long"), "time_message"),
        (lambda: ChatCollator(Processor(), time_mesage="long"), "time_message"),
        (lambda: ChatCollator(Processor(), paddin=True), "padding"),
    ],
)
def test_interfaces_name_the_nearest(call, nearest):
    with pytest.raises(TypeError, match=f"did you mean {nearest}"):
        call()


class Processor:
    """Says which arguments it takes, as processors of transformers do."""

    class Texts:
        padding: bool

    class valid_processor_kwargs:  # noqa: N801
        text_kwargs: dict


Processor.valid_processor_kwargs.__annotations__["text_kwargs"] = Processor.Texts


def test_a_processor_that_says_nothing_gets_every_argument():
    ChatCollator(object(), anything=1)
    ChatCollator(Processor(), padding=False, text_kwargs={})


def test_the_plugin_refuses_unknown_model_arguments(monkeypatch):
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    contents = {
        "lmms_eval.api.instance": {"Instance": object},
        "lmms_eval.api.model": {"lmms": object},
        "lmms_eval.models.registry_v2": {"ModelManifest": lambda *_, **__: None},
    }
    for name, values in contents.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**values))
    monkeypatch.delitem(sys.modules, "framestream.trainer.lmms_plugin", raising=False)
    plugin = importlib.import_module("framestream.trainer.lmms_plugin")
    monkeypatch.delitem(sys.modules, "framestream.trainer.lmms_plugin")
    monkeypatch.setattr(plugin, "Predictor", lambda *given: given)
    monkeypatch.setattr(plugin, "resolve_run", lambda *given: given)
    made = plugin.ChatModel("run", frames=512, batch_size=1, max_batch_size=None, device="cuda:0")
    assert made._predictor == ("run", None, ("frames.max=512",))
    with pytest.raises(TypeError, match="^SimpleModel: unknown argument frame; did you mean frames.$"):
        plugin.ChatModel("run", frame=512)
