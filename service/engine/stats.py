"""What an engine tells about itself: counters since it started and gauges of this moment."""

from __future__ import annotations

from dataclasses import dataclass

from service.engine.distribution import NOTHING, Distribution

SAMPLING_REVISION = 2
"""Of how tokens are drawn and scored. To be raised with whatever may draw another token, or tell of another log
probability, for the same logits: a request must not be resumed across it.
"""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of one replica. Times are seconds; counters only ever grow while the replica lives.

    `num_prompt_tokens` counts prompt tokens computed, those computed again after a preemption included.
    `num_resumptions` counts the times a request that had been preempted got memory again. Steps that absorb more than
    one token of any sequence are `prefill_steps_s`, all others `decode_steps_s`. `start_up` is how long each phase of
    loading took. `by_key` is, for each key that has any, its id, its running and its
    waiting requests. `seconds_per_request` is how long it takes, while there is work, until one more request has ended.

    `num_free_blocks` nobody uses; of them `num_idle_blocks` hold what the prefix cache can find, as do
    `num_cached_blocks` complete blocks, in use or idle, and `num_snapshots` states. The tokens are those that the
    prefix cache was asked about, and had; an eviction is a block it had to forget, or to swap out. `num_swapped_blocks`
    wait outside of the memory cache.

    `num_queued_tokens` and `num_running_tokens` are still to be computed for requests that wait and that run, as far as
    can be expected (see `Backlog`); `backlog_s` is how long full batches take for them. The tokens a second are the
    engine's measured capacity, 0 while unknown; `work_s` grows by the time that computed tokens take at that (see
    `Capacity`).
    """

    replica: str
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_slots: int = 0
    num_free_slots: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_resumptions: int = 0
    num_aborted: int = 0
    num_idle_blocks: int = 0
    num_cached_blocks: int = 0
    num_snapshots: int = 0
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_evictions: int = 0
    num_swapped_blocks: int = 0
    num_swap_outs: int = 0
    num_swap_ins: int = 0
    step_time_s: float = 0.0
    forward_time_s: float = 0.0
    idle_time_s: float = 0.0
    start_up: tuple[tuple[str, float], ...] = ()
    by_key: tuple[tuple[str, int, int], ...] = ()
    seconds_per_request: float = 1.0
    num_queued_tokens: int = 0
    num_running_tokens: int = 0
    backlog_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    generation_tokens_per_s: float = 0.0
    work_s: float = 0.0
    decode_steps_s: Distribution = NOTHING
    prefill_steps_s: Distribution = NOTHING
    batch_sizes: Distribution = NOTHING
    step_tokens: Distribution = NOTHING


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """Whether a request sent now would make progress. `reason` says why not, in words fit for a client.

    Where it `is_asleep`, no engine runs, because nothing was asked for; a request wakes one and waits for it.
    """

    is_healthy: bool
    reason: str = ""
    seconds_since_progress: float = 0.0
    is_asleep: bool = False


@dataclass(frozen=True, slots=True)
class Fleet:
    """How many engine replicas there should be, and how many of them are there."""

    num_wanted: int
    num_running: int


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a gateway must know of the engine it speaks to.

    `max_num_requests` may run and wait at the same time, and those that wait may come to `max_num_waiting_tokens`.
    `tokenizer` is the digest of the tokenizer beside the weights, empty where there is none: ids mean what that says.
    """

    model_dir: str
    vocab_size: int
    max_model_len: int
    eos_token_id: int | None
    dtype: str
    memory_dtype: str
    device: str
    kernel_path: str
    fingerprint: str
    num_parameters: int
    max_num_requests: int
    max_num_waiting_tokens: int = 262_144
    kernel_revision: int = 0
    tokenizer: str = ""

    @property
    def system_fingerprint(self) -> str:
        """Equal for two engines exactly when they give the same bytes for the same seeded request."""
        kernel = f"{self.kernel_path}.{self.kernel_revision}" if self.kernel_revision else self.kernel_path
        parts = (self.fingerprint[:12], kernel, self.dtype, self.memory_dtype, f"s{SAMPLING_REVISION}")
        return "-".join(parts)
