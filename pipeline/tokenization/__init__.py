"""Chat templates and the token cache: dialogues as token ids and labels."""
