"""Helpers shared by the build and fetch rooms."""
