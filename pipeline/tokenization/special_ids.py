"""Ids that are not in any vocabulary; their values are those of LLaVA."""

from __future__ import annotations

IMAGE_TOKEN_INDEX = -200  #: input id of a visual token, or before expansion of a media item

IGNORE_INDEX = -100  #: label of a token without loss
