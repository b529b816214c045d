"""Check a shard root against docs/format.md."""
