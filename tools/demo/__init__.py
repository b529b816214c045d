"""Synthetic data of the demo: worlds, dialogues and a tokenizer."""
