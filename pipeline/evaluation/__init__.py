"""Questions and prompts for evaluation, chat and needle-in-a-haystack tests."""
