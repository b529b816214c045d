"""Run the tasks of a build in this process: no start of workers, and their errors are seen here."""

from __future__ import annotations

import pytest

from framestream.tools.builder import executors
from framestream.tools.builder.task import make_worker


def use_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``--executor local`` run tasks one after the other in this process."""

    def run(job, tasks):
        work = make_worker(job)
        for task in tasks:
            work(task, {}, False, lambda *report: None)
            yield {"media": 1}

    monkeypatch.setattr(executors, "local", lambda workers: run)
