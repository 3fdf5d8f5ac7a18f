"""Where requests go: to their session or their prefix as long as that is no burden, to the least loaded otherwise."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.request import Request
from service.routing import PAGE_TOKENS, Affinity, pages_of, session_home
from tests.engine.scripted import make_request

REPLICAS = ("a", "b", "c")


def ask(prompt: tuple[int, ...], session_id: str = "", choice_index: int = 0, seed: int = 0) -> Request:
    return replace(make_request("r", prompt, choice_index=choice_index, seed=seed), session_id=session_id)


def text(number: int, num_pages: int, tail: int = 5) -> tuple[int, ...]:
    return (number,) * (num_pages * PAGE_TOKENS) + (99,) * tail


def test_pages_are_beginnings() -> None:
    assert pages_of(ask((1,) * (PAGE_TOKENS - 1))) == []
    one, two = pages_of(ask(text(1, 2))), pages_of(ask(text(1, 3)))
    assert two[:2] == one
    assert pages_of(ask((7, *text(1, 2)[1:])))[1] != one[1]
    assert pages_of(replace(ask(text(1, 2)), cache_salt="s"))[0] != one[0]
    resumed = replace(ask(text(1, 2, tail=0)), output_token_ids=(1,) * PAGE_TOKENS)
    assert pages_of(resumed) == two, "what was generated is part of the text"


def test_without_anything_known_the_least_loaded_is_next() -> None:
    assert Affinity().choose(ask(text(1, 2)), {"a": 3, "b": 1, "c": 2}) == "b"


def test_a_prompt_goes_where_most_of_it_is() -> None:
    affinity, idle = Affinity(), dict.fromkeys(REPLICAS, 0)
    assert affinity.choose(ask(text(1, 2)), {"a": 0, "b": 1, "c": 1}) == "a"
    assert affinity.choose(ask(text(1, 4)), {"a": 9, "b": 0, "c": 1}) == "b"
    for _ in range(5):
        assert affinity.choose(ask(text(1, 6)), idle) == "b"
        assert affinity.choose(ask(text(2, 1)), {"a": 1, "b": 1, "c": 0}) == "c"


def test_without_prefixes_sessions_and_choices_alone_bind() -> None:
    affinity = Affinity(by_prefix=False)
    assert affinity.choose(ask(text(1, 4)), {"a": 0, "b": 1, "c": 1}) == "a"
    assert affinity.choose(ask(text(1, 4)), {"a": 1, "b": 0, "c": 1}) == "b"
    assert affinity.choose(ask(text(1, 4), choice_index=1), {"a": 1, "b": 1, "c": 0}) == "b"
    assert affinity.choose(ask((), session_id="s"), {"a": 1, "b": 0, "c": 1}) == session_home("s", REPLICAS)


def test_affinity_is_no_burden() -> None:
    affinity = Affinity()
    loads = Counter(dict.fromkeys(REPLICAS, 0))
    for _ in range(30):
        loads[affinity.choose(ask(text(1, 4)), loads)] += 1
    assert max(loads.values()) - min(loads.values()) <= 2
    for _ in range(300):
        loads[affinity.choose(ask(text(1, 4), session_id="s"), loads)] += 1
    assert max(loads.values()) <= min(loads.values()) + 0.25 * sum(loads.values()) / 3 + 1


def test_a_session_stays_and_all_gateways_agree() -> None:
    gateways, idle = [Affinity(), Affinity()], dict.fromkeys(REPLICAS, 0)
    for number in range(20):
        homes = {g.choose(ask(text(n, 2), session_id=f"s{number}"), idle) for n in range(4) for g in gateways}
        assert len(homes) == 1, "whatever they say"
    homes = {session_home(f"s{number}", REPLICAS): None for number in range(20)}
    assert set(homes) == set(REPLICAS)


def test_only_the_sessions_of_a_replica_that_left_move() -> None:
    before = {f"s{n}": session_home(f"s{n}", REPLICAS) for n in range(100)}
    after = {session: session_home(session, ("a", "c")) for session in before}
    assert all(after[session] == home for session, home in before.items() if home != "b")
    assert {after[session] for session, home in before.items() if home == "b"} == {"a", "c"}


def test_choices_of_a_prompt_stay_together_even_on_a_loaded_replica() -> None:
    affinity = Affinity()
    home = affinity.choose(ask((1, 2), seed=4), {"a": 0, "b": 1})
    assert home == "a"
    assert affinity.choose(ask((1, 2), choice_index=1, seed=4), {"a": 9, "b": 0}) == "a"
    assert affinity.choose(ask((1, 2), choice_index=1, seed=5), {"a": 9, "b": 0}) == "b"
    assert affinity.choose(ask((1, 2), choice_index=2, seed=4), {"b": 0}) == "b", "it is gone"


def test_what_a_replica_cannot_remember_is_not_looked_for_there() -> None:
    affinity, small = Affinity(), {"a": 4 * PAGE_TOKENS, "b": 4 * PAGE_TOKENS}
    affinity.choose(ask(text(1, 4)), {"a": 0, "b": 1}, small)
    affinity.choose(ask(text(2, 3)), {"a": 0, "b": 1}, small)
    # Of the first text its beginning alone is left: the end goes first.
    assert affinity._given["a"].match(pages_of(ask(text(1, 4)))) == 1
    affinity.choose(ask(text(3, 9)), {"a": 0, "b": 1}, small)
    assert affinity._given["a"].match(pages_of(ask(text(1, 4)))) == 0
    assert affinity.choose(ask(text(2, 3)), {"a": 1, "b": 0}, {"a": 0, "b": 0}) == "b"


def test_replicas_that_left_are_forgotten() -> None:
    affinity = Affinity()
    for number in range(50):
        affinity.choose(ask(text(1, 1)), {f"replica-{number}": 0})
    assert len(affinity._given) == 1


@pytest.mark.parametrize("num_replicas", [1, 2, 5])
@given(data=st.data())
def test_nobody_is_ever_far_above_the_least_loaded(num_replicas: int, data: st.DataObject) -> None:
    affinity, loads = Affinity(), dict.fromkeys([f"r{n}" for n in range(num_replicas)], 0)
    for _ in range(data.draw(st.integers(1, 60))):
        if data.draw(st.integers(0, 3)) == 0:
            leaver = data.draw(st.sampled_from(sorted(loads)))
            loads[leaver] = max(loads[leaver] - 1, 0)
            continue
        prompt = text(data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3)))
        before = dict(loads)
        chosen = affinity.choose(ask(prompt, session_id=data.draw(st.sampled_from(["", "x", "y"]))), loads)
        loads[chosen] += 1
        most = min(before.values()) + max(2, 0.25 * sum(before.values()) / num_replicas)
        assert before[chosen] < most or before[chosen] == min(before.values())
