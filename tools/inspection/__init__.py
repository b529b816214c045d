"""HTML report about a shard root."""
