"""Read annotation files and normalize their samples."""
