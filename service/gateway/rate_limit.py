"""How many requests and tokens a key may use in a minute: buckets that fill at a steady rate. Knows no HTTP server."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from service.gateway.api_keys import ApiKey
from service.gateway.errors import ApiError, BadRequestError, retry_after

_SWEEP_S = 60.0


class TokenBucket:
    """Holds up to one minute's allowance, is full at first and fills evenly."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = now_s

    def resize(self, per_minute: int) -> None:
        """Changes the allowance; what was used stays used."""
        self._level += per_minute - self.per_minute
        self.per_minute = per_minute

    def remaining(self, now_s: float) -> float:
        """What could be taken now. Below zero after the allowance was cut, or a request took more than it asked for."""
        self._level = min(self._level + max(now_s - self._at_s, 0.0) * self.per_minute / 60, float(self.per_minute))
        self._at_s = max(now_s, self._at_s)
        return self._level

    def seconds_until(self, amount: float, now_s: float) -> float:
        """How long until `amount` can be taken; 0 where it can be at once."""
        return max(amount - self.remaining(now_s), 0.0) * 60 / self.per_minute

    def take(self, amount: float, now_s: float) -> None:
        self._level = min(self.remaining(now_s) - amount, float(self.per_minute))


@dataclass(slots=True)
class _Buckets:
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None

    def is_full(self, now_s: float) -> bool:
        """Whether new buckets would be no different."""
        both = (self.requests, self.tokens)
        return all(bucket is None or bucket.seconds_until(bucket.per_minute, now_s) == 0 for bucket in both)


class RateLimiter:
    """The buckets of every key that has limits. `default_*` are those of keys that have none of their own."""

    def __init__(
        self,
        default_requests_per_minute: int | None = None,
        default_tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._default_requests = default_requests_per_minute
        self._default_tokens = default_tokens_per_minute
        self._clock = clock
        self._buckets: dict[str, _Buckets] = {}
        self._swept_s = clock()

    def check(self, key: ApiKey | None) -> None:
        """Raises ApiError 429 where `key` has no request left, so that nothing need be read of one more."""
        if key is not None:
            buckets = self._of(key)
            _require(buckets.requests, 1, "requests", Reservation(buckets.requests, buckets.tokens, 0, self._clock))

    def reserve(self, key: ApiKey | None, num_tokens: int) -> Reservation:
        """Takes one request and `num_tokens` from the key's allowance. Without a key there is no limit.

        Raises ApiError 429 where it has not that much left, and BadRequestError where it never will.
        """
        if key is None:
            return Reservation(None, None, 0, self._clock)
        buckets = self._of(key)
        if buckets.tokens is not None and num_tokens > buckets.tokens.per_minute:
            raise BadRequestError(
                f"the request may come to {num_tokens} tokens, prompt and longest completion together; this API key "
                f"may use {buckets.tokens.per_minute} a minute",
                param="max_tokens",
                code="rate_limit_exceeded",
            )
        reservation = Reservation(buckets.requests, buckets.tokens, num_tokens, self._clock)
        _require(buckets.requests, 1, "requests", reservation)
        _require(buckets.tokens, num_tokens, "tokens", reservation)
        reservation.take()
        return reservation

    def _of(self, key: ApiKey) -> _Buckets:
        now_s = self._clock()
        if key.id not in self._buckets:
            self._sweep(now_s)
        buckets = self._buckets.setdefault(key.id, _Buckets())
        buckets.requests = _fit(buckets.requests, key.requests_per_minute or self._default_requests, now_s)
        buckets.tokens = _fit(buckets.tokens, key.tokens_per_minute or self._default_tokens, now_s)
        return buckets

    def _sweep(self, now_s: float) -> None:
        """Forgets buckets that are full, those of keys that are no more among them. At most once a minute."""
        if now_s - self._swept_s >= _SWEEP_S:
            self._swept_s = now_s
            self._buckets = {key: buckets for key, buckets in self._buckets.items() if not buckets.is_full(now_s)}


class Reservation:
    """What one request has taken from its key's allowance, until it is known what it used."""

    def __init__(
        self, requests: TokenBucket | None, tokens: TokenBucket | None, num_tokens: int, clock: Callable[[], float]
    ) -> None:
        self._requests = requests
        self._tokens = tokens
        self._num_tokens = num_tokens
        self._clock = clock
        self._is_open = False

    @property
    def now_s(self) -> float:
        return self._clock()

    def take(self) -> None:
        self._is_open = True
        self._move(1, self._num_tokens)

    def settle(self, num_tokens: int) -> None:
        """The request has ended and used `num_tokens`: what it had reserved beyond them is free again."""
        if self._is_open:
            self._is_open = False
            self._move(0, num_tokens - self._num_tokens)

    def cancel(self) -> None:
        """The request was refused by another limit: it has used nothing."""
        if self._is_open:
            self._is_open = False
            self._move(-1, -self._num_tokens)

    def headers(self) -> dict[str, str]:
        """Limits, what is left of them and when they are whole again, as OpenAI's API tells them."""
        now_s, headers = self._clock(), {}
        for noun, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{noun}"] = str(bucket.per_minute)
                headers[f"x-ratelimit-remaining-{noun}"] = str(max(int(bucket.remaining(now_s)), 0))
                headers[f"x-ratelimit-reset-{noun}"] = duration(bucket.seconds_until(bucket.per_minute, now_s))
        return headers

    def _move(self, num_requests: int, num_tokens: int) -> None:
        now_s = self._clock()
        if self._requests is not None:
            self._requests.take(num_requests, now_s)
        if self._tokens is not None:
            self._tokens.take(num_tokens, now_s)


def _require(bucket: TokenBucket | None, amount: int, noun: str, reservation: Reservation) -> None:
    """Raises ApiError 429 where `bucket` has not `amount` left."""
    if bucket is None or (wait_s := bucket.seconds_until(amount, reservation.now_s)) <= 0:
        return
    raise ApiError(
        429,
        f"this API key may use {bucket.per_minute} {noun} a minute: "
        f"{max(int(bucket.remaining(reservation.now_s)), 0)} are left, {amount} are needed",
        code="rate_limit_exceeded",
        headers=reservation.headers() | {"Retry-After": retry_after(wait_s)},
    )


def duration(seconds: float) -> str:
    """ "1m30s", "2s" or "120ms", rounded up."""
    milliseconds = -int(-seconds * 1000 // 1)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(-(-milliseconds // 1000), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _fit(bucket: TokenBucket | None, per_minute: int | None, now_s: float) -> TokenBucket | None:
    """The bucket of a limit that may have changed since."""
    if per_minute is None:
        return None
    if bucket is None:
        return TokenBucket(per_minute, now_s)
    if bucket.per_minute != per_minute:
        bucket.remaining(now_s)
        bucket.resize(per_minute)
    return bucket
