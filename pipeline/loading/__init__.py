"""Decode planned rows ahead of the training step, and make batches of them."""
