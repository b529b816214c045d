"""Read and write weights: of runs, of published checkpoints, and of the Hugging Face hub."""
