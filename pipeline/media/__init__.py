"""Decode videos and images, sample and resize frames, and encode them for storage."""
