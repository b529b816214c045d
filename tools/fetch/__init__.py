"""Sources of media and annotation files: local folders, the hub, web servers, buckets, video pages and archives."""
