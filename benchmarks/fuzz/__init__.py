"""Damage every file that the project reads, at random but repeatably, and judge what its commands make of it."""
