"""Memory of a CPU run that the next step uses again, instead of the kernel zeroing new pages for every tensor."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  #: parameters of mallopt in glibc's malloc.h
LARGEST = 32 * 2**20  #: bytes, the largest value that mallopt takes for M_MMAP_THRESHOLD
NEVER = 2**31 - 1  #: bytes that the heap keeps before it returns any
SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  #: a user's own choice


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors of up to 32 MiB free, which a step otherwise gives back and takes anew.

    The peak of a run stays its peak. Returns False, and changes nothing, with another C library than glibc and where
    the environment has settings of its own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in SETTINGS):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, NEVER))
