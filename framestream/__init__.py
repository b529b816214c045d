"""framestream: streaming shards and a trainer for video language models.

``framestream.pipeline`` reads shards, ``framestream.tools`` builds them, ``framestream.trainer`` trains on them. In a
checkout the three packages and the manifests stand at the top level, and this folder links to them.
"""

from __future__ import annotations

from importlib import metadata

try:
    __version__ = metadata.version("framestream")
except metadata.PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
