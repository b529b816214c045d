"""Epoch plans: which dialogues an epoch contains, their order, and their packing into rows."""
