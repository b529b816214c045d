"""Build a shard root: plan, worker tasks, and the last steps that write the index."""
