"""One root of real footage for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.corpora.real_root import build
from tests.helpers.model.torchvision_import import import_torchvision

import_torchvision()  # before anything imports transformers


@pytest.fixture(scope="session")
def footage_root(tmp_path_factory) -> Path:
    """ROOT/shards/stage2, as :mod:`tests.helpers.corpora.real_root` builds it."""
    return build(tmp_path_factory.mktemp("footage"))
