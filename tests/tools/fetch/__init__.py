"""Tests of tools/fetch."""
