"""Text from tokens one at a time: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_service import demo_tokenizer
from memserve.engine.detokenizer import STOP_CHARACTERS_MAX, STOPS_MAX, Detokenizer, StopScanner, check_stops


def cut(data, places):
    """``data`` cut at the given places, which may repeat and lie beyond the end."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(st.text(), st.lists(st.integers(0, 1000)))
def test_any_cut_of_any_text_comes_out_whole(text, places):
    """Any text comes out whole however its bytes are cut, and no character is shown in parts."""
    pieces = cut(text.encode(), places)
    detokenizer = Detokenizer(pieces.__getitem__)
    outputs = [detokenizer.push(token) for token in range(len(pieces))]

    assert "".join(outputs) + detokenizer.finish() == text
    for count in range(len(outputs) + 1):
        assert text.startswith("".join(outputs[:count]))


@given(st.binary(), st.lists(st.integers(0, 1000)))
def test_bytes_that_are_no_text_come_out_as_replacement_characters(data, places):
    """Bytes that are not UTF-8 come out as replacement characters, as when decoded at once."""
    pieces = cut(data, places)
    detokenizer = Detokenizer(pieces.__getitem__)
    outputs = [detokenizer.push(token) for token in range(len(pieces))]

    assert "".join(outputs) + detokenizer.finish() == data.decode("utf-8", "replace")


def test_a_character_of_several_tokens_waits_for_its_last():
    """A character of several tokens comes out with its last token."""
    tokenizer = demo_tokenizer()
    tokens = tokenizer.encode("日🚀", allow_special=False)
    assert len(tokens) > 3
    detokenizer = Detokenizer(tokenizer.piece)

    outputs = [detokenizer.push(token) for token in tokens]

    assert [output for output in outputs if output] == ["日", "🚀"]
    assert detokenizer.finish() == ""
    detokenizer.push(tokens[0])
    assert detokenizer.finish() == "�"


def test_time_per_token_does_not_grow():
    """The time for a token does not grow with the length of the stream."""
    detokenizer = Detokenizer(lambda _token: b"word ")
    scanner = StopScanner(["\n\nUser:"])

    def run(count):
        start = time.perf_counter()
        for token in range(count):
            scanner.push(detokenizer.push(token))
        return time.perf_counter() - start

    first = min(run(5000) for _ in range(3))
    run(100_000)
    assert min(run(5000) for _ in range(3)) < 10 * first


def naive(text, stops):
    """The text up to the stop string that is complete first, the longest if there are several, by trying every end."""
    for end in range(len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return text[: end - len(longest)], longest
    return text, None


letters = st.text("ab", max_size=40)
stops = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


@given(letters, stops, st.lists(st.integers(0, 1000), max_size=8))
def test_stop_strings_are_found_however_the_text_is_cut(text, stops, places):
    """Stop strings are found however the text is cut, and no part of them is passed on."""
    scanner = StopScanner(stops)
    outputs = [scanner.push(part) for part in cut(text, places)]
    before, matched = naive(text, stops)

    assert scanner.matched == matched
    assert "".join(outputs) + scanner.finish() == before
    sent = ""
    for part, output in zip(cut(text, places), outputs, strict=True):
        sent += output
        assert before.startswith(sent), (part, output)


@given(letters, stops)
def test_only_what_may_become_a_stop_string_is_held_back(text, stops):
    """Only text that may become a stop string is held back."""
    scanner = StopScanner(stops)
    output = scanner.push(text)
    if scanner.matched is None:
        held = text[len(output) :]
        longer = [text[i:] for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in stops)]
        assert held == max(longer, key=len, default="")


def test_nothing_comes_out_after_a_stop():
    """No text comes out after a stop string."""
    scanner = StopScanner(["STOP"])

    assert scanner.push("one STOP two") == "one "
    assert scanner.push("three") == ""
    assert scanner.finish() == ""


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (["x"] * (STOPS_MAX + 1), f"at most {STOPS_MAX} stop strings, got {STOPS_MAX + 1}"),
        (["ok", ""], "stop string 1 is empty"),
        (["x" * (STOP_CHARACTERS_MAX + 1)], f"has {STOP_CHARACTERS_MAX + 1} characters, at most"),
    ],
)
def test_stop_strings_have_limits(stops, text):
    """The number and length of stop strings are limited."""
    with pytest.raises(ValueError, match=text):
        check_stops(stops)


def test_the_limits_themselves_are_allowed():
    """As many and as long stop strings as the limits say are accepted."""
    check_stops(["x" * STOP_CHARACTERS_MAX] * STOPS_MAX)
    check_stops([])
