"""The most that a machine lets a cell give: from what a server's steps move and compute, and from the machine's rates.

Knows the numbers alone, which `python -m model.kernels.roofline` prints; measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from loadtests.errors import ResultsError


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Bytes and operations of a server's steps, and the machine's rates of both in a second.

    A step reads the weights once and each sequence's pairs once, and computes for each new token, for each sequence's
    logits and for each pair read.
    """

    weights_bytes: float
    pair_bytes: float
    token_operations: float
    output_operations: float
    pair_operations: float
    bytes_rate: float
    product_rate: float
    read_rate: float

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Raises ResultsError where a number is missing or not above 0."""
        try:
            costs = cls(**{field.name: float(values[field.name]) for field in fields(cls)})
        except (KeyError, TypeError, ValueError) as error:
            raise ResultsError(f"step costs: {error!r}") from error
        if not all(value > 0 for value in asdict(costs).values()):
            raise ResultsError("step costs: every number is above 0")
        return costs

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ResultsError."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ResultsError(f"{path}: {error}") from error
        if not isinstance(values, dict):
            raise ResultsError(f"{path}: not a JSON object")
        return cls.of(values)

    def described(self) -> dict[str, float]:
        return asdict(self)

    def prefill_s(self, num_tokens: int, num_cached: int = 0) -> float:
        """Computing a prompt of `num_tokens`, of which the first `num_cached` are remembered."""
        products = (num_tokens - num_cached) * self.token_operations + self.output_operations
        pairs = sum(range(num_cached, num_tokens))
        return products / self.product_rate + pairs * self.pair_operations / self.read_rate

    def decode_s(self, num_sequences: int, context: int) -> float:
        """A step of one token for each of `num_sequences` that have `context`: moving or computing, the longer."""
        pairs = num_sequences * context
        moving = (self.weights_bytes + pairs * self.pair_bytes) / self.bytes_rate
        products = num_sequences * (self.token_operations + self.output_operations)
        return max(moving, products / self.product_rate + pairs * self.pair_operations / self.read_rate)

    def tokens_per_s(
        self, concurrency: int, prompt_tokens: int, output_tokens: int, shared_prefix_tokens: int = 0
    ) -> float:
        """Output tokens a second of `concurrency` sequences that are absorbed one by one, then generated together.

        The prompt's last token gives the first output; a shared prefix is remembered.
        """
        absorbing = concurrency * self.prefill_s(prompt_tokens, shared_prefix_tokens)
        steps = range(prompt_tokens, prompt_tokens + output_tokens - 1)
        generating = sum(self.decode_s(concurrency, context) for context in steps)
        return concurrency * output_tokens / (absorbing + generating)


def cell_roofline(costs: StepCosts, cell: Mapping[str, Any]) -> float | None:
    """Tokens a second of a cell as a results file describes it; None of one whose lengths or users are not known."""
    workload, concurrency = cell["workload"], cell["load"]["concurrency"]
    if concurrency is None or workload["num_texts"]:
        return None
    return costs.tokens_per_s(
        concurrency, workload["prompt_tokens"], workload["output_tokens"], workload["shared_prefix_tokens"]
    )
