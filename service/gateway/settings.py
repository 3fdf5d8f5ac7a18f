"""Limits and switches of one gateway: everything a client can size has a bound here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Sizes are bytes, characters or counts as named; `*_s` are seconds.

    `cors_origins` empty means that no other web site may call this server from a browser. `allowed_hosts` empty
    means that clients may call it by any name, see `HostGuard`. `threaded_chars` is the length of prompt text from
    which tokenizing leaves the event loop. `name` tells gateways of the same engines apart.
    `requests_per_minute` and `tokens_per_minute` bound each API key that has no bounds of its own. `has_public_metrics`
    lets those without a key see the metrics. `root_path` is where a proxy shows this server.
    A stream that has nothing to say for `keep_alive_s` says that it lives; None: it does not.
    `has_debug` opens `/debug/`. A request that took `slow_request_s` is worth a line of its own in the log.
    """

    name: str = "0"
    max_body_bytes: int = 4 * 1024 * 1024
    body_timeout_s: float = 30.0
    max_prompts: int = 128
    max_n: int = 64
    max_choices: int = 256
    max_stops: int = 16
    max_stop_chars: int = 256
    max_stop_token_ids: int = 64
    max_user_chars: int = 256
    max_cache_salt_chars: int = 256
    max_logprobs: int = 20
    max_logprob_token_ids: int = 128
    max_told_logprobs: int = 1_000_000
    max_logit_bias: int = 1024
    max_allowed_token_ids: int = 1024
    max_bad_words: int = 64
    max_bad_word_bytes: int = 64
    max_grammar_bytes: int = 65_536
    max_schema_depth: int = 64
    max_regex_chars: int = 4096
    max_choice_texts: int = 1024
    max_timeout_s: float = 3600
    threaded_chars: int = 16_384
    health_timeout_s: float = 2.0
    stats_timeout_s: float = 2.0
    abort_timeout_s: float = 5.0
    keep_alive_s: float | None = 15.0
    drain_grace_s: float = 1.0
    drain_retry_after_s: float = 5.0
    root_path: str = ""
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    has_public_metrics: bool = False
    has_debug: bool = False
    slow_request_s: float = 30.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
