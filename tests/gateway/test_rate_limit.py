"""Rates: no window ever sees more than was allowed, what was not used comes back, and clients are told."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.tokenizer import Tokenizer
from service.engine.errors import EngineOverloadedError, KeyOverloadedError
from service.engine.request import FinishReason, Request, SamplingParams
from service.gateway.api_keys import ApiKey, KeyRing, keys_of_options
from service.gateway.errors import ApiError, BadRequestError
from service.gateway.plan import CompletionPlan
from service.gateway.quota import claim
from service.gateway.rate_limit import RateLimiter, TokenBucket, duration
from service.gateway.settings import GatewaySettings
from tests.gateway.fake_engine import INFO, FakeEngine, say, steps
from tests.gateway.server import GatewayServer, served_model

KEY = ApiKey(id="k", sha256="0" * 64, requests_per_minute=6, tokens_per_minute=600)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def limiter(clock: Clock, **defaults: int) -> RateLimiter:
    return RateLimiter(**defaults, clock=clock)


def refusal(limits: RateLimiter, num_tokens: int, key: ApiKey = KEY) -> ApiError:
    with pytest.raises(ApiError) as caught:
        limits.reserve(key, num_tokens)
    assert caught.value.status == 429
    return caught.value


@given(
    per_minute=st.integers(1, 1000),
    asks=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 1000)), max_size=60),
)
def test_no_window_sees_more_than_its_allowance(per_minute: int, asks: list[tuple[float, int]]) -> None:
    """In any span of t seconds at most a full bucket and t seconds' filling are taken; waiting as told is enough."""
    now_s, taken = 0.0, list[tuple[float, int]]()
    bucket = TokenBucket(per_minute, now_s)
    for after_s, amount in asks:
        now_s += after_s
        wait_s = bucket.seconds_until(amount, now_s)
        if amount <= per_minute and wait_s > 0:
            now_s += wait_s + 1e-6
            assert bucket.seconds_until(amount, now_s) == 0
        if bucket.seconds_until(amount, now_s) == 0:
            bucket.take(amount, now_s)
            taken.append((now_s, amount))
        else:
            assert amount > per_minute
        assert -1e-6 <= bucket.remaining(now_s) <= per_minute
    for first in range(len(taken)):
        total = 0
        for at_s, amount in taken[first:]:
            total += amount
            assert total <= per_minute + (at_s - taken[first][0]) * per_minute / 60 + 1e-3


@settings(deadline=None)
@given(
    runs=st.lists(
        st.tuples(st.floats(0, 30), st.integers(1, 600), st.floats(0, 1), st.sampled_from(["settle", "cancel"])),
        max_size=40,
    )
)
def test_only_what_was_used_is_paid_for(runs: list[tuple[float, int, float, str]]) -> None:
    """A key is refused exactly when a bucket that had known the true costs, and holds what is reserved, would."""
    clock = Clock()
    limits, truth = limiter(clock), TokenBucket(600, clock.now_s)
    key = KEY.model_copy(update={"requests_per_minute": None})
    for after_s, num_tokens, part, end in runs:
        clock.now_s += after_s
        expected = truth.seconds_until(num_tokens, clock.now_s)
        try:
            reservation = limits.reserve(key, num_tokens)
        except ApiError:
            assert expected > -1e-6
            continue
        assert expected < 1e-3
        used = int(num_tokens * part) if end == "settle" else 0
        reservation.settle(used) if end == "settle" else reservation.cancel()
        reservation.settle(10**6)  # the second end counts for nothing
        truth.take(used, clock.now_s)


def test_requests_and_tokens_are_bounded_each() -> None:
    clock = Clock()
    limits = limiter(clock)
    for _ in range(6):
        limits.reserve(KEY, 1)
    error = refusal(limits, 1)
    assert "6 requests a minute: 0 are left, 1 are needed" in error.message
    assert error.headers["Retry-After"] == "10"
    clock.now_s += 10
    limits.reserve(KEY, 594)
    clock.now_s += 10
    error = refusal(limits, 600)
    assert "600 tokens a minute: 106 are left, 600 are needed" in error.message
    assert error.headers["Retry-After"] == "50"
    assert error.headers["x-ratelimit-limit-tokens"] == "600"
    assert error.headers["x-ratelimit-remaining-tokens"] == "106"
    assert error.headers["x-ratelimit-reset-tokens"] == "50s"
    assert error.headers["x-ratelimit-remaining-requests"] == "1"


def test_a_refusal_takes_nothing() -> None:
    clock = Clock()
    limits = limiter(clock)
    limits.reserve(KEY, 500)
    for _ in range(20):
        refusal(limits, 200)
    assert limits.reserve(KEY, 100).headers()["x-ratelimit-remaining-requests"] == "4"


def test_what_never_fits_is_no_matter_of_time() -> None:
    with pytest.raises(BadRequestError, match=r"601 tokens.*may use 600 a minute") as caught:
        limiter(Clock()).reserve(KEY, 601)
    assert caught.value.param == "max_tokens"


def test_a_keys_own_limit_wins_over_the_default_and_a_new_one_counts_at_once() -> None:
    clock = Clock()
    limits = limiter(clock, default_requests_per_minute=2)
    other = ApiKey(id="other", sha256="1" * 64)
    limits.reserve(other, 10**9)
    limits.reserve(other, 10**9)
    refusal(limits, 0, other)
    limits.reserve(KEY, 0)
    limits.reserve(KEY, 0)
    limits.reserve(KEY, 0)
    refusal(limits, 0, KEY.model_copy(update={"requests_per_minute": 3}))
    limits.reserve(KEY.model_copy(update={"requests_per_minute": 4}), 0)
    assert limits.reserve(other.model_copy(update={"requests_per_minute": 10}), 0).headers() != {}


def test_keys_that_are_gone_leave_nothing_behind() -> None:
    """What is forgotten is no different from what a key that comes back is given."""
    clock = Clock()
    limits = limiter(clock)
    gone = [KEY.model_copy(update={"id": f"gone-{i}"}) for i in range(100)]
    for key in gone:
        limits.reserve(key, 600)
    clock.now_s += 59
    limits.reserve(KEY, 1)
    assert len(limits._buckets) == 101
    refusal(limits, 600, gone[0])
    clock.now_s += 1
    limits.reserve(KEY.model_copy(update={"id": "new"}), 0)
    assert set(limits._buckets) == {"k", "new"}
    limits.reserve(gone[0], 600)


def test_without_a_key_nothing_is_counted() -> None:
    limits = limiter(Clock(), default_requests_per_minute=1)
    for _ in range(3):
        assert limits.reserve(None, 10**9).headers() == {}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.0001, "1ms"), (0.12, "120ms"), (1, "1s"), (59.5, "1m0s"), (90, "1m30s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def plan_of(num_requests: int, num_tokens: int) -> CompletionPlan:
    request = Request("r", (1,), SamplingParams(max_tokens=num_tokens - 1))
    return CompletionPlan("r", 0, "m", (request,) * num_requests, num_choices=num_requests, num_prompt_tokens=1, seed=0)


@pytest.mark.parametrize(
    ("num_requests", "num_tokens", "key", "words"),
    [
        (10, 10, None, ""),
        (5, 10, KEY, ""),
        (6, 10, KEY, "at most 5"),
        (10, 20, None, ""),
        (10, 21, None, "may come to 210 tokens.*at most 200 fit"),
        (5, 21, KEY, "may come to 105 tokens.*at most 100 fit"),
        (1, 500, KEY, ""),
    ],
)
def test_what_the_queue_could_never_hold_is_refused_for_good(
    num_requests: int, num_tokens: int, key: ApiKey | None, words: str
) -> None:
    info = replace(INFO, max_num_requests=10, max_num_waiting_tokens=200)
    plan = plan_of(num_requests, num_tokens)
    if not words:
        claimed, _ = claim(plan, key, info, limiter(Clock()))
        assert {request.key_id for request in claimed.requests} == {key.id if key else ""}
        return
    with pytest.raises(BadRequestError, match=words) as caught:
        claim(plan, key, info, limiter(Clock()))
    assert caught.value.param == "n"


SECRET = "sk-0123456789"
LIMITS = {"requests_per_minute": 60, "tokens_per_minute": 10_000}


@pytest.fixture
def limited(engine: FakeEngine, tokenizer: Tokenizer) -> Iterator[httpx.Client]:
    """Speaks to a server with a limit for each key, with such a key. Time stands still there."""
    ring = KeyRing(keys_of_options([SECRET]))
    with (
        GatewayServer(engine, served_model(tokenizer=tokenizer), GatewaySettings(**LIMITS), keys=ring) as server,
        httpx.Client(base_url=server.url, timeout=60, headers={"Authorization": f"Bearer {SECRET}"}) as client,
    ):
        server.app.state.gateway.limiter._clock = Clock()
        yield client


def remaining(answer: httpx.Response) -> int:
    return int(answer.headers["x-ratelimit-remaining-tokens"])


@pytest.mark.parametrize("stream", [False, True])
def test_answers_tell_what_is_left(limited: httpx.Client, engine: FakeEngine, stream: bool) -> None:
    engine.script = say([5, 6, 7])
    body = {"prompt": [1] * 10, "max_tokens": 400, "stream": stream}
    first = limited.post("/v1/completions", json=body)
    assert first.headers["x-ratelimit-limit-requests"] == "60"
    assert first.headers["x-ratelimit-limit-tokens"] == "10000"
    assert remaining(first) == 10_000 - 410
    assert first.headers["x-ratelimit-reset-requests"].endswith("s")
    # The second: 10 + 3 tokens were used by the first; what it had reserved beyond them is back.
    second = limited.post("/v1/completions", json=body)
    assert remaining(second) == 10_000 - 13 - 410
    assert int(second.headers["x-ratelimit-remaining-requests"]) == 58


def test_the_official_client_sees_a_rate_limit(limited: httpx.Client, engine: FakeEngine) -> None:
    engine.script = say([5] * 400)
    with openai.OpenAI(base_url=f"{limited.base_url}/v1", api_key=SECRET, max_retries=0) as client:

        def until_refused() -> None:
            for _ in range(60):
                client.completions.create(model="mosaic", prompt=[1] * 100, max_tokens=400)

        with pytest.raises(openai.RateLimitError, match="10000 tokens a minute") as caught:
            until_refused()
        answer = caught.value.response
        assert answer.headers["retry-after"] == "3"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert len(engine.requests) == 20


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineOverloadedError("full", 7.2), 503, "overloaded"),
        (KeyOverloadedError("your share", 7.2), 429, "queue_share_exceeded"),
    ],
)
def test_what_the_engine_refuses_costs_nothing(
    limited: httpx.Client, engine: FakeEngine, error: Exception, status: int, code: str
) -> None:
    engine.script = steps(error)
    for _ in range(3):
        answer = limited.post("/v1/completions", json={"prompt": [1], "max_tokens": 500})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert answer.headers["retry-after"] == "8"
        assert remaining(answer) == 10_000 - 501


def test_a_client_that_leaves_pays_for_what_it_used(limited: httpx.Client, engine: FakeEngine) -> None:
    engine.script = steps([5], FinishReason.ERROR)
    assert limited.post("/v1/completions", json={"prompt": [1] * 100, "max_tokens": 400}).status_code == 500
    engine.script = say([5])
    left = remaining(limited.post("/v1/completions", json={"prompt": [1], "max_tokens": 1}))
    assert left == 10_000 - 101 - 2


def test_a_key_without_a_request_left_is_told_before_its_body_is_read(limited: httpx.Client) -> None:
    for _ in range(61):
        limited.post("/tokenize", json={"prompt": "x"})
    answer = limited.post("/v1/completions", content=b"{nonsense", headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"


def test_a_wrong_request_is_told_so_before_its_tokens_are_counted(limited: httpx.Client, engine: FakeEngine) -> None:
    engine.script = say([5] * 400)
    while limited.post("/v1/completions", json={"prompt": [1] * 100, "max_tokens": 400}).status_code == 200:
        pass
    answer = limited.post("/v1/completions", json={"prompt": [1] * 100, "max_tokens": 400, "temperature": -1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "temperature")


def test_tokenizing_counts_as_a_request(limited: httpx.Client) -> None:
    answers = [limited.post("/tokenize", json={"prompt": "x"}) for _ in range(64)]
    assert [answer.status_code for answer in answers[:60]] == [200] * 60
    assert answers[-1].status_code == 429
    assert limited.get("/v1/models").status_code == 200


def test_no_log_line_is_written_for_limits_alone(limited: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(62):
            limited.post("/tokenize", json={"prompt": "x"})
    assert not caplog.records
