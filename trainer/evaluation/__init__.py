"""Score a model on held-out questions, and write pages about runs and scores."""
