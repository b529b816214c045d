"""Save, load and convert the checkpoints of a run."""
