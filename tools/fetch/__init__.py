"""Bytes of media and annotation files, wherever a root map says they are."""
