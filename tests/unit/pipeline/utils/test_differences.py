"""What is said of settings that differ: short, and by the items of lists."""

from __future__ import annotations

import copy

from framestream.pipeline.config.manifest import load_manifest
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.utils.differences import describe_changes

WORDS = ("saved", "now")
ENTRIES = [{"name": name, "sampling": "all", "annotation": f"{name}.json"} for name in "abcdef"]


def changes(before: object, after: object) -> str:
    return describe_changes({"data.entries": before}, {"data.entries": after}, WORDS)


def test_items_of_lists_are_named():
    assert changes(ENTRIES, ENTRIES) == ""
    assert changes(ENTRIES[:5], ENTRIES) == "data.entries (1 added: f)"
    assert changes(ENTRIES, ENTRIES[4:]) == "data.entries (4 removed: a, b, c, ...)"
    assert changes(ENTRIES, ENTRIES[::-1]) == "data.entries (in another order)"
    other = copy.deepcopy(ENTRIES)
    other[2]["sampling"] = "first:1"
    assert changes(ENTRIES, other) == ("data.entries (1 changed, such as c: sampling (saved: 'all', now: 'first:1'))")
    assert changes([], ENTRIES[:1]) == "data.entries (1 added: a)"
    assert changes([ENTRIES[0], ENTRIES[0]], [ENTRIES[0]]) == "data.entries (1 removed: a~2)"
    assert changes(None, ENTRIES).startswith("data.entries (saved: None, now: [{'name': 'a', ")


def test_few_fields_are_shown():
    before = {f"f{number}": number for number in range(9)}
    assert describe_changes(before, {}, WORDS) == (
        "f0 (saved: 0, now: None), f1 (saved: 1, now: None), f2 (saved: 2, now: None), 6 more"
    )


def test_a_large_manifest_is_described_in_a_short_line():
    before = to_dict(load_manifest("stage3"))
    after = copy.deepcopy(before)
    after["data"]["entries"] = [{**entry, "name": f"other {entry['name']}"} for entry in after["data"]["entries"]]
    after["mix"] = [{"root": "r" * 1000, "entries": []}]
    text = describe_changes(before, after, WORDS)
    assert text.startswith("data (entries (") and len(text) < 800
