"""HTTP client for media files: whole downloads and ranged reads, with limits and retries."""
