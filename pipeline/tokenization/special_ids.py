"""TODO."""

from __future__ import annotations

IMAGE = -200  #: id that stands where visual tokens go

IGNORE = -100  #: label of a place that is not learned
