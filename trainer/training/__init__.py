"""The training loop of a stage, and what it needs before its first step."""
