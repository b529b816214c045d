"""framestream's trainer: train, score, chat with and export video language models."""
