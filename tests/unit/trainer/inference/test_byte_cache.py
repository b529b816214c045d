"""The cache of values within its bound in memory."""

from __future__ import annotations

from framestream.trainer.inference.byte_cache import ByteCache


def test_the_cache_drops_the_least_recently_used():
    cache: ByteCache[str] = ByteCache(10)
    cache.put("a", "A", 4)
    cache.put("b", "B", 4)
    assert cache.get("a") == "A"
    cache.put("c", "C", 4)
    assert [cache.peek(key) for key in "abc"] == ["A", None, "C"] and cache.nbytes == 8
    cache.put("c", "D", 6)
    assert cache.peek("c") == "D" and cache.nbytes == 10
    cache.put("big", "E", 11)
    assert cache.peek("big") is None and cache.nbytes == 10
    assert cache.get("b") is None and (cache.hits, cache.misses) == (1, 1)
