"""Stop strings: what is let through, what is held back, which one counts, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.gateway.stops import StopFinder, StopSet

LETTERS = st.text(alphabet="ab", max_size=12)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)


def first_match(text: str, stops: list[str]) -> tuple[str, str] | None:
    """The text before the stop string completed first, and that string; the longest where several end together."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return None


def longest_open_suffix(text: str, stops: list[str]) -> int:
    """Length of the longest end of `text` that some stop string begins with and goes on from."""
    prefixes = [stop[:length] for stop in stops for length in range(1, len(stop))]
    return max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)


@given(pieces=st.lists(LETTERS, max_size=6), stops=STOPS)
def test_any_cut_of_a_text_gives_the_same_and_holds_back_no_more_than_needed(
    pieces: list[str], stops: list[str]
) -> None:
    finder = StopFinder(StopSet(stops))
    expected = first_match("".join(pieces), stops)
    seen, free, stop = "", "", None
    for piece in pieces:
        seen += piece
        text, stop = finder.push(piece)
        free += text
        if stop is not None:
            break
        assert len(seen) - len(free) == longest_open_suffix(seen, stops)
    if expected is None:
        assert stop is None
        assert free + finder.flush() == "".join(pieces)
    else:
        assert (free, stop) == expected


@given(before=LETTERS, after=LETTERS, stops=STOPS)
def test_a_stop_string_completed_while_not_armed_is_text(before: str, after: str, stops: list[str]) -> None:
    finder = StopFinder(StopSet(stops))
    free, stop = finder.push(before, is_armed=False)
    assert stop is None
    text, stop = finder.push(after)
    whole = before + after
    ends = [end for end in range(len(before) + 1, len(whole) + 1) if any(whole[:end].endswith(s) for s in stops)]
    assert (stop is not None) == bool(ends)
    if stop is None:
        assert free + text + finder.flush() == whole
    else:
        assert free + text == whole[: ends[0] - len(stop)]
        assert whole[: ends[0]].endswith(stop)


@pytest.mark.parametrize(
    ("stops", "text", "free", "stop"),
    [
        (["abcd", "bc"], "xabcd", "xa", "bc"),  # Completed first, though the other began first.
        (["bc", "abc"], "xabc", "x", "abc"),  # Completed together: the one that began first.
        (["aab"], "aaab", "a", "aab"),
        (["\n\n"], "one\n\ntwo", "one", "\n\n"),
        (["é"], "café!", "caf", "é"),
        (["end", "end"], "the end", "the ", "end"),
    ],
)
def test_which_stop_string_counts(stops: list[str], text: str, free: str, stop: str) -> None:
    assert StopFinder(StopSet(stops)).push(text) == (free, stop)


def test_what_is_held_back_comes_with_the_flush() -> None:
    finder = StopFinder(StopSet(["stop"]))
    assert finder.push("do not sto") == ("do not ", None)
    assert finder.flush() == "sto"
    assert finder.flush() == ""
