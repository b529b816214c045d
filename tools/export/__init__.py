"""Write a shard root as media files and annotations for trainers that read files."""
