"""What follows a text: the longest that a new one begins with, and how far it goes with any."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.engine.continuations import Continuations

TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)


@given(known=st.lists(TEXTS, unique=True, max_size=8), gone=st.sets(st.integers(0, 7)), text=TEXTS)
def test_it_finds_what_a_look_at_all_of_them_finds(
    known: list[tuple[int, ...]], gone: set[int], text: tuple[int, ...]
) -> None:
    continuations = Continuations()
    for i, tokens in enumerate(known):
        continuations.add(b"parent", b"%d" % i, tokens)
        continuations.add(b"another", b"-%d" % i, text)
    for i in gone:
        continuations.remove(b"%d" % i)
    left = {i: tokens for i, tokens in enumerate(known) if i not in gone}
    continuations.check_integrity({*(b"%d" % i for i in left), *(b"-%d" % i for i in range(len(known)))})
    common = [n for tokens in left.values() for n in range(7) if tokens[:n] == text[:n] and n <= len(tokens)]
    assert continuations.num_common(b"parent", text) == min(max(common, default=0), len(text))
    begun = {tokens: i for i, tokens in left.items() if text[: len(tokens)] == tokens}
    longest = max(begun, key=len, default=())
    assert continuations.longest(b"parent", text) == ((b"%d" % begun[longest], len(longest)) if begun else (None, 0))


def test_it_looks_at_the_latest_alone() -> None:
    continuations = Continuations()
    for i in range(1000):
        continuations.add(b"parent", b"%d" % i, (i,))
    assert continuations.num_common(b"parent", (999,)) == 1
    assert continuations.num_common(b"parent", (0,)) == 0
    continuations.remove(b"999")
    continuations.remove(b"999")
    assert continuations.num_common(b"parent", (999,)) == 0
