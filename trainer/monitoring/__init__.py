"""Log lines, metrics, per-step statistics, the profiler and the ledger of a run."""
