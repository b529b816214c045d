"""The model: vision towers, connector and language model, and what they cost."""
