"""Log lines of a training run, with time and rank. They do not tear the progress bar."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

LOGGER = "framestream"  #: the parent of every logger of this package
FORMAT = "{asctime} rank {rank} {levelname} {message}"


class ProgressBarHandler(logging.StreamHandler):
    """Writes lines above the progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, and draw the bar again below it."""
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:  # as in logging's own handlers: a log line that cannot be written does not end the run
            self.handleError(record)


def setup_logging(rank: int) -> None:
    """Write the package's log lines to stderr: from INFO on rank 0, from WARNING on the others.

    What all ranks would say alike is logged at INFO, so that it appears once. Repeated calls replace the handler.
    """
    logger = logging.getLogger(LOGGER)
    for handler in [handler for handler in logger.handlers if isinstance(handler, ProgressBarHandler)]:
        logger.removeHandler(handler)
    handler = ProgressBarHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT, "%Y-%m-%d %H:%M:%S", style="{", defaults={"rank": rank}))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False  # a library's handler on the root logger would print each line again
