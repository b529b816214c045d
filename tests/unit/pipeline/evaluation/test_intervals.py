"""Intervals in answers: every documented form, what is no interval, and the clock of a video."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline import Questions
from framestream.pipeline.evaluation.intervals import (
    IntervalError,
    VideoClock,
    parse_intervals,
    read_intervals,
    stated_intervals,
)
from tests.helpers.corpora.small_root import Root, manifest, turns

#: forms of one interval from a to b
FORMS = (
    "{a} - {b}",
    "{a}-{b}",
    "{a} – {b}",
    "{a} ~ {b} seconds",
    "from {a} to {b} seconds",
    "From {a}s to {b}s.",
    "{a} s until {b} s",
    "The given query happens in {a} - {b} seconds.",
    "The given query happens in the {a} seconds - {b} seconds.",
    "[{a}, {b}]",
    "[{a} {b}]",
    "({a}, {b})",
    "<{a}> <{b}> He waves.",
    "<{a}>-<{b}>",
    "between {a} and {b} seconds",
    "from second {a} to second {b}",
    "It starts at {a} seconds and ends at {b} seconds.",
    "Start time: {a} seconds\nEnd time: {b} seconds",
    '{{"start": {a}, "end": {b}}}',
    "<think>It is 1 - 2 s.</think><answer>{a} to {b}</answer>",
    "{a}, {b}",
    "{a} {b} seconds",
    "从{a}秒到{b}秒",
    "from {a_clock} to {b_clock}",
    "{a_clock} - {b_clock}",
    "starts at {a_clock} and ends at {b_clock}",
    "{a_long} to {b_long}",
    "**{a}** to **{b}** seconds",
    "_{a}_ s to `{b}` s",
    "{a} s → {b} s",
    "{a}->{b}",
    "<{a}> => <{b}>",
    "{a_clock} --> {b_clock}",
    "{a_subtitle} --> {b_subtitle}",
    "between seconds {a} and {b}",
    "between [{a}] and [{b}]",
    "[{a}] to [{b}]",
    "({a_clock}) - ({b_clock})",
    "from the {a}-second mark to the {b}-second mark",
    "He enters at {a} seconds and leaves at {b} seconds.",
    "He walks in at {a_clock}, and is gone at about {b_clock}.",
    "{a_comma} - {b_comma}",
    "{a_comma}-{b_comma}",
    "from {a_comma} to {b_comma} seconds",
    "({a_comma} s - {b_comma} s)",
    "between {a_comma} and {b_comma} seconds",
    "starts at {a_comma} s and ends at {b_comma} s",
)
seconds = st.integers(0, 35_999_99).map(lambda hundredths: hundredths / 100)


def clock(second: float) -> str:
    """``m:ss``, or ``h:mm:ss``, with hundredths."""
    whole, hundredths = divmod(round(second * 100), 100)
    minutes, rest = divmod(whole, 60)
    hours, part = divmod(minutes, 60)
    return (f"{hours}:{part:02}" if hours else f"{minutes}") + f":{rest:02}.{hundredths:02}"


def words(second: float) -> str:
    """``2 min 3.5 s``."""
    minutes, rest = divmod(round(second * 100), 6000)
    return f"{minutes} min {rest / 100} s"


def subtitle(second: float) -> str:
    """``hh:mm:ss,mmm``."""
    whole, hundredths = divmod(round(second * 100), 100)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02},{hundredths:02}0"


def comma(second: float) -> str:
    return str(second).replace(".", ",")


@given(st.sampled_from(FORMS), seconds, seconds)
def test_an_interval_is_read_as_it_was_written(form, a, b):
    kinds = {"": str, "_clock": clock, "_long": words, "_subtitle": subtitle, "_comma": comma}
    text = form.format(**{f"{x}{kind}": write(y) for kind, write in kinds.items() for x, y in (("a", a), ("b", b))})
    (found,) = parse_intervals(text)
    assert found == pytest.approx((min(a, b), max(a, b)), abs=1e-6)  # the ends of a reversed one are exchanged


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=5), st.sampled_from((", ", "; ", " and ", "\n")))
def test_several_intervals_keep_their_order(pairs, between):
    text = between.join(f"{a} - {b} seconds" for a, b in pairs)
    assert parse_intervals(text) == [(min(pair), max(pair)) for pair in pairs]
    assert parse_intervals(str([list(pair) for pair in pairs])) == [(min(pair), max(pair)) for pair in pairs]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0-5,10-15,20-25", [(0, 5), (10, 15), (20, 25)]),
        ("0 - 5,10 - 15", [(0, 5), (10, 15)]),
        ("0 to 5,10 to 15", [(0, 5), (10, 15)]),
        ("[3,10]", [(3, 10)]),
        ("(3,10)", [(3, 10)]),
        ("(3,10 s)", [(3, 10)]),
        ("3,10", [(3, 10)]),
        ("[[3,10],[12,15]]", [(3, 10), (12, 15)]),
        ("3,2 - 10,5 and 12,5 - 15", [(3.2, 10.5), (12.5, 15)]),
        ("1,000 - 2,500 seconds", [(1000, 2500)]),
        ("00:03,00:10", [(3, 10)]),
        ("from 1 to 2.5 minutes", [(60, 150)]),
        ("30 to 1 min 5 s", [(30, 65)]),
        ("At 2 s he sits, at 5 s he stands. The answer is 3.2 - 10.5.", [(3.2, 10.5)]),
    ],
)
def test_commas_and_units_are_of_one_number_or_of_both(text, expected):
    assert parse_intervals(text) == expected


@given(st.text(max_size=300))
def test_any_text_is_read_in_bounded_time(text):
    for a, b in parse_intervals(text):
        assert 0 <= a <= b


@pytest.mark.parametrize(
    "text",
    ["", "no", "3", "at 3.2 seconds", "2019-05-03", "10% - 20%", "frames 3 to 10", "v1.2-3", "the 3rd to 5th", "1 2 3"],
)
def test_what_states_no_interval(text):
    assert parse_intervals(text) == [] == stated_intervals(text)


COMMAS = ("1,", "1,111", ",111", "- 1,1", "at ", "at 1 ", "between ", "**", "*1", "1-", "[1] to ", "to the ", "- ")


@pytest.mark.parametrize(
    "pathological", ["start ", "1 - ", "1", "[", "1 min ", "start 1 end ", "<1> ", "1.1.", *COMMAS]
)
def test_long_texts_do_not_hang(pathological):
    parse_intervals(pathological * 5000)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The given query happens in 0.0 - 6.9 seconds.", [(0, 6.9)]),
        ("3.2 - 10.5", [(3.2, 10.5)]),
        ("[3, 10]", [(3, 10)]),
        ("00:03 to 00:10", [(3, 10)]),
        ("<3.2> <10.5> Because he waves.", [(3.2, 10.5)]),
        ("0.0 - 6.9 seconds and 10 - 12 seconds", [(0, 6.9), (10, 12)]),
        ("2 - 1", []),  # a result
        ("3 to 5 people", []),
        ("2019 - 2021", []),
        ("(3, 10)", []),
        ("It happens twice, from 3 s to 5 s.", [(3, 5)]),
        ("It happens 2 times, from 3 s to 5 s.", []),  # another number
        ("0 - 6 seconds, spread butter. 9 - 12 seconds, add cheese.", []),  # a dense caption
        ("3.0 - 3.0 seconds", []),  # has no length
        ("a red ball", []),
        ("3.2 - 10.5 while he waves", [(3.2, 10.5)]),
        ("3.2 to 10.5, a man waves", [(3.2, 10.5)]),
        ("3,2 - 10,5", [(3.2, 10.5)]),
        ("**3.2** to **10.5** seconds", [(3.2, 10.5)]),
        ("1 to 2 minutes", [(60, 120)]),
        ("It costs 1.5 - 2.5 dollars", []),
        ("It costs between 1.5 and 2.5", []),
        ("$1.5 - $2.5", []),
        ("1.5 - 2.5 €", []),
        ("2.5 - 3.5 meters", []),
        ("2.5 - 3.5 m", []),
        ("2.5m - 3.5m", []),
        ("1.5-2.5kg", []),
        ("[2.5, 3.5] meters", []),
        ("It starts at 2.5 meters and ends at 3.5 meters", []),
        ("1.5 to 2.5 furlongs", []),
        ("It is red at 3.2 s and green at 10.5 s", []),  # two events
    ],
)
def test_answers_that_are_about_time_and_nothing_else(answer, expected):
    assert stated_intervals(answer) == expected


@pytest.mark.parametrize(
    "value", [[3.2, 10.5], "3 - 10", [[3]], [[10, 3]], [[3, 3]], [[-1, 3]], [["3", "10"]], [[True, 3]], [[0, 1]] * 1001]
)
def test_intervals_of_annotations_are_checked(value):
    with pytest.raises(IntervalError, match="intervals: "):
        read_intervals(value)
    for pair in ([0, float("inf")], [float("nan"), 1], [0, float("nan")], [-float("inf"), 1], [0, 10**400]):
        with pytest.raises(IntervalError, match="must be a start from 0 and a later end$"):
            read_intervals([pair])


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.floats(0, 100), st.floats(0.5, 60))
def test_told_seconds_become_those_of_the_source(gaps, start, fps):
    """Told: frame k of a clip at k / fps. Stored: whatever times the frames have."""
    told, source = np.arange(len(gaps)) / fps, start + np.cumsum(gaps) / 100
    video = VideoClock.of_frames(told, source, start, 1e6)
    for k in range(len(gaps)):
        assert video.to_source((told[k], told[k])) == pytest.approx((source[k], source[k]), abs=2e-3)
    after = video.to_source((told[-1] + 1, told[-1] + 2))
    assert after == pytest.approx((source[-1] + 1, source[-1] + 2), abs=2e-3)


def test_the_clock_of_a_clip_has_its_stored_times(tmp_path):
    root = Root(tmp_path)
    plain, clip, image = root.video(16, 16), root.video(16, 16), root.still(150, 60)
    root.media[clip] |= {"start": 60.0, "timestamps": [60.0 + 0.5 * f + (0.3 if f > 8 else 0) for f in range(16)]}
    for media in ([plain], [clip], [image], [plain, clip]):
        marks = "<image>\n" * len(media)
        root.dialogue(turns(f"{marks}When?", "2.0 - 6.0 seconds"), media, split="val", meta={"intervals": [[62, 66.2]]})
    questions = Questions(manifest(root.write()))
    whole, part, *others = (questions.clock(i) for i in range(4))
    assert whole.to_source((2.0, 6.0)) == (2.0, 6.0) and (whole.start, whole.end) == (0.0, 8.0)
    assert part.to_source((2.0, 6.0)) == pytest.approx((62.0, 66.3)) and (part.start, part.end) == (60.0, 68.0)
    assert part.crop((50.0, 61.0)) == (60.0, 61.0) and part.crop((10.0, 60.0)) is None
    assert others == [None, None] and questions[1].intervals == [(62.0, 66.2)]


def test_invalid_intervals_are_named(tmp_path):
    root = Root(tmp_path)
    for meta in ({"intervals": [[5, 2]]}, {"intervals": [[2, 5]], "options": ["a", "b"]}, {"intervals": []}):
        root.dialogue(turns("<image>\nWhen?", "a"), [root.video(8, 8)], split="val", meta=meta)
    questions = Questions(manifest(root.write()))
    assert len(questions) == 1 and questions[0].intervals == []
    assert "later end" in questions.rejected[0] and "options" in questions.rejected[1]
