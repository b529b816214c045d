"""Import of a torchvision that was built for another torch: transformers imports it whenever it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

_schemas: list[torch.library.Library] = []


def import_torchvision() -> None:
    """Import torchvision if it is installed; declare its operators here if torch cannot load them."""
    if not importlib.util.find_spec("torchvision"):
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _schemas.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _schemas[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
