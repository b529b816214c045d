"""The server of :mod:`framestream.trainer.serve`: answers over HTTP as the OpenAI API does, and a page for people."""
