"""torch's profiler over a few optimizer steps of rank 0: ``train.profile_step`` and ``train.profile_steps``.

RUN/profile/steps-000010-000011.json.gz    the trace, for chrome://tracing or https://ui.perfetto.dev
RUN/profile/steps-000010-000011.txt        operators by self time
"""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile, supported_activities

from framestream.pipeline.config.training import TrainConfig

ROWS = 60  #: operators in the table


class Profiler:
    """Records the optimizer steps that ``train`` names, counted from 1.

    A run that is resumed after the first of these steps records nothing.
    """

    def __init__(self, run: Path, train: TrainConfig, steps: int) -> None:
        self._folder = run / "profile"
        self._running: profile | None = None
        self._first = train.profile_step
        self._last = min(steps, (train.profile_step or 0) + train.profile_steps - 1)

    def start_step(self, step: int) -> None:
        """Start recording if ``step``, which begins now, is the first one to record."""
        if step == self._first:
            activities = {ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()
            self._running = profile(activities=sorted(activities, key=str))
            self._running.start()

    def end_step(self, step: int) -> None:
        """Stop recording and write the files if ``step``, which is complete, is the last one to record."""
        if self._running is None or step < self._last:
            return
        recorded, self._running = self._running, None
        recorded.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._first:06d}-{self._last:06d}"
        device = "cuda" if ProfilerActivity.CUDA in supported_activities() else "cpu"
        table = recorded.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=ROWS)
        path.with_suffix(".txt").write_text(table, encoding="utf-8")
        recorded.export_chrome_trace(f"{path}.json.gz")
