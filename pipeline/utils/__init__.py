"""Helpers without knowledge of the data: files, threads, retries, memory maps."""
