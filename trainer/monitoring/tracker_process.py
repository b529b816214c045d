"""One experiment tracker in a process of its own: ``python -m framestream.trainer.monitoring.tracker_process NAME``.

The input is JSON lines: ``{"project", "options", "settings"}`` of the run, then ``[figures, step]`` of each step. The
output is one line, ``{"id"}`` of the run at the tracker, and perhaps a second one, ``{"fault"}``. What libraries print
goes to the error output, and so does the traceback of a fault. The process ends with its input, also when the trainer
was killed.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import sys
import traceback
from typing import Any, TextIO

FINISH_SECONDS = 60.0  #: after the end of the input; a library may wait for its server for ever
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)  #: of environment variables


def start_tracker(name: str, project: str, options: dict[str, Any], settings: dict[str, Any] | None) -> Any:
    """Start a run at a tracker, or go on in one, by accelerate's tracking class.

    Args:
        name: of the tracker.
        project: of the run there.
        options: keywords of the tracking class.
        settings: kept with the run; None if it has them already.

    Returns:
        the started ``accelerate.tracking.GeneralTracker``.
    """
    from accelerate import tracking
    from accelerate.state import PartialState

    PartialState()  # which accelerate's own log lines ask for
    tracker = tracking.LOGGER_TYPE_TO_CLASS[name](project, **options)
    tracker.start()
    if settings is not None:
        tracker.store_init_configuration(settings)
    return tracker


def feed_tracker(name: str, lines: TextIO, answers: TextIO) -> None:
    """Pass the figures in ``lines`` on to a tracker; write its run's id to ``answers``."""
    first = json.loads(lines.readline())
    tracker = start_tracker(name, first["project"], first["options"], first["settings"])
    run_id = tracker.tracker.info.run_id if name == "mlflow" else first["id"]  # MLflow's server chooses it
    print(json.dumps({"id": run_id}), file=answers, flush=True)
    for line in lines:
        figures, step = json.loads(line)
        tracker.log(figures, step)
    faulthandler.dump_traceback_later(FINISH_SECONDS, exit=True)
    tracker.finish()


def describe_fault(error: BaseException) -> str:
    """Describe an error of a library in one line without keys: of variables, and of users and queries in addresses."""
    return f"{hide_secrets(' '.join(f'{type(error).__name__}: {error}'.split())):.200}"


def hide_secrets(text: str) -> str:
    """Replace the values of secret variables, and users and queries in addresses, by ``***``."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= 4:
            text = text.replace(value, "***")
    text = re.sub(r"(?<=://)[^/\s@]*@", "***@", text)
    return re.sub(r"[?]\S*=\S*", "?***", text)


def main() -> None:
    """Serve the tracker that the command line names, then end without the exit handlers of its library."""
    lines, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 0)  # a library that asks for a key gets no answer
    os.dup2(2, 1)
    faulthandler.enable()
    status = 0
    try:
        feed_tracker(sys.argv[1], lines, answers)
    except BaseException as error:  # noqa: BLE001  # libraries raise anything, SystemExit too
        print(f"{sys.argv[1]}: {hide_secrets(traceback.format_exc())}", file=sys.stderr, flush=True)
        print(json.dumps({"fault": describe_fault(error)}), file=answers, flush=True)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
