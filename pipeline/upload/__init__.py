"""Upload folders to the hub and to buckets: what is there is not sent again, and what was sent is compared.

``transfer`` has the order of the steps. A target is a repository or bucket of the hub, or a bucket of a cloud.
``shard_root`` says which files a shard root has, and which may be replaced.
"""
