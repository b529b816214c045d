"""TODO."""

from __future__ import annotations

IMAGE_TOKEN_INDEX = -200  #: id that stands where visual tokens go

IGNORE_INDEX = -100  #: label of a place that is not learned
