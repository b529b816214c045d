"""Read the files of a shard root from a local folder, a web server, a bucket or the Hugging Face hub.

index = Index.open("https://host/shards/stage2")
first, second = index.storage.read(index.shard(0), [(1536, 18000), (900000, 17500)])
"""

from __future__ import annotations

import os

from framestream.pipeline.storage.addresses import is_remote, open_resolver
from framestream.pipeline.storage.base import ReadOptions, ReadOptionsError, ShardRef, Storage
from framestream.pipeline.storage.local import LocalStorage
from framestream.pipeline.storage.remote import RemoteStorage
from framestream.pipeline.storage.shard_copies import CopyingStorage
from framestream.pipeline.utils.paths import expand_path

__all__ = ["ReadOptions", "ReadOptionsError", "ShardRef", "Storage", "is_remote", "open_storage"]


def open_storage(root: str | os.PathLike[str], options: ReadOptions | None = None) -> Storage:
    """Open the storage of ``root``.

    The root is a folder, ``https://HOST/PATH``, ``http://HOST/PATH``, ``s3://BUCKET/PATH``, ``gs://BUCKET/PATH``,
    ``az://CONTAINER/PATH``, ``hf://datasets/OWNER/NAME[@REVISION]/PATH`` or ``hf://buckets/OWNER/NAME/PATH``. ``~`` and
    variables in the path of a folder are expanded.

    Raises:
        ReadOptionsError: shards are to be copied, and there is no room, or the folder cannot be written.
        ValueError: the address has another form.
        OSError: the hub does not have the repository, or cannot be reached, or the login of a bucket is incomplete.
    """
    options = options or ReadOptions()
    if is_remote(root):
        storage: Storage = RemoteStorage(open_resolver(str(root), options), options)
    else:
        storage = LocalStorage(root if os.path.exists(root) else expand_path(os.fspath(root)), options)
    return CopyingStorage(storage, options) if options.access == "sequential" else storage
