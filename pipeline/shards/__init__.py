"""The shard format: write shards, index them, and read frames by byte offset.

A shard is a plain USTAR file whose members are ``KEY.EXT``. The members of a sample stand side by side, and every
sample of a folder has the same extensions::

    video/train-000000.tar      KEY.mp4 KEY.json    a clip; every frame of the MP4 is a complete JPEG
    image/train-000000.tar      KEY.jpg KEY.json    an image
    dialogue/train-000000.tar   KEY.json            a dialogue with the keys of its media

``samples`` and ``encode`` make the bytes of the members, ``writer`` the tar files, ``sidecars`` the small files beside
them that other readers need. ``index`` holds the location of every frame and dialogue, ``ledger`` what is not in the
shards and why. ``frame_reader`` and ``media_view`` read them. The same input gives the same bytes. docs/format.md
specifies the format, and ``tools/verify`` checks shards against that page with code of its own.
"""
