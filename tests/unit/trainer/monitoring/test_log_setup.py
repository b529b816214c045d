"""Log lines carry time, level and rank, appear once, and stay above the progress bar."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest
from tqdm import tqdm

from framestream.trainer.monitoring.log_setup import LOGGER, ProgressBarHandler, setup_logging

logger = logging.getLogger("framestream.trainer.training.loop")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Other tests find the package's logger as it was."""
    package = logging.getLogger(LOGGER)
    handlers, level, propagate = list(package.handlers), package.level, package.propagate
    yield
    package.handlers[:], package.propagate = handlers, propagate
    package.setLevel(level)


def test_lines_have_time_rank_and_level(capsys: pytest.CaptureFixture) -> None:
    setup_logging(0)
    setup_logging(0)
    logger.info("resumed from the checkpoint of step %d", 4)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank 0 INFO resumed from the checkpoint of step 4", line)


def test_other_ranks_log_warnings_only(capsys: pytest.CaptureFixture) -> None:
    setup_logging(3)
    logger.info("the same on every rank")
    logger.warning("of this rank alone")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("rank 3 WARNING of this rank alone")


def test_lines_do_not_tear_the_progress_bar() -> None:
    terminal = io.StringIO()
    handler = ProgressBarHandler(terminal)
    with tqdm(total=2, file=terminal, desc="stage", ascii=True) as bar:
        bar.update()
        handler.emit(logging.makeLogRecord({"msg": "saved checkpoint"}))
        text = terminal.getvalue()
    before, _, after = text.partition("saved checkpoint\n")
    assert before.endswith("\r")  # the bar was erased before the line
    assert "stage:" in after  # and drawn again below it
