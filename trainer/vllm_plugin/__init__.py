"""Plug-in for vLLM: exports that load by themselves, with the frames, tiles and tokens of training."""
