"""MosaicNetwork: what Memory Mosaics of every version share, from token ids to logits around their blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.arithmetic import compute_dtype
from model.cache import MemoryBatch
from model.config import NetworkConfig
from model.layers import LayerNorm, Linear
from model.step_plan import StepPlan


class Step(Protocol):
    """One call on a batch of a cache, through all layers. State is written back by `commit` alone."""

    plan: StepPlan

    def past(self, layer: int) -> object:
        """The past as that layer's block sees it, to be asked layer after layer."""
        ...

    def commit(self) -> None:
        """Writes the state after the last token of every sequence into the cache."""
        ...


class MosaicNetwork(nn.Module):
    """A language model of associative memories: embedding, blocks, head.

    Without a cache it maps whole sequences to logits and trains; with one it maps the next tokens of many sequences,
    one or several each, and updates the cache. Both forms run the same layers. A subclass gives the blocks and the two
    forms of the past that they are written against, and draws its initial values.
    """

    PRECISE: ClassVar[tuple[str, ...]]
    """Ends of the names of parameters that set a scale or a decay."""

    def __init__(
        self,
        config: NetworkConfig,
        blocks: Iterable[nn.Module],
        *,
        norm_bias: bool = False,
        is_tied: bool = False,
        logit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.config, self.logit_scale = config, logit_scale
        self.fingerprint = ""
        """Hexadecimal sha256 of configuration and weights file; empty for a model that was not loaded from one."""
        self.embedding = nn.Embedding(
            config.vocab_size, config.n_embd, _weight=torch.empty(config.vocab_size, config.n_embd)
        )
        self.blocks = nn.ModuleList(blocks)
        self.norm = LayerNorm(config.n_embd, bias=norm_bias)
        self.head: nn.Module | None = None if is_tied else Linear(config.n_embd, config.vocab_size, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weight matrices."""
        return self.embedding.weight.dtype

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def cast_weights(self, dtype: torch.dtype) -> Self:
        """Stores the weights as `dtype`, except the few that set a scale, a decay or a norm: float32 at least."""
        self.to(compute_dtype(dtype))
        for name, parameter in self.named_parameters():
            if not name.endswith(self.PRECISE) and "norm." not in name:
                parameter.data = parameter.data.to(dtype)
        return self

    def forward(self, token_ids: Tensor, cache: MemoryBatch | None = None, *, all_logits: bool = False) -> Tensor:
        """Logits of the token after each token, float32 (float64 for a float64 model).

        Without a cache: token_ids [batch, time] int64 -> [batch, time, vocab_size].
        With one: token_ids [tokens] int64, the batch's sequences one after another -> [sequences, vocab_size], after
        the last token of each, or with `all_logits` [tokens, vocab_size]. Absorbs the tokens into the cache; an
        exception leaves every sequence as it was. Without gradients.
        Raises ValueError if token_ids has another shape.
        """
        if cache is not None:
            return self._step(token_ids, cache, all_logits=all_logits)
        if token_ids.ndim != 2 or token_ids.shape[1] == 0:
            raise ValueError(f"token_ids: expected [batch, time] with a token at least, got {list(token_ids.shape)}")
        x = self._embed(token_ids)
        past = self._whole_past(token_ids)
        for block in self.blocks:
            x = block(x, past)
        return self._logits(x)

    @torch.no_grad()
    def _step(self, token_ids: Tensor, batch: MemoryBatch, *, all_logits: bool) -> Tensor:
        if token_ids.shape != (batch.num_tokens,):
            raise ValueError(f"token_ids: expected [{batch.num_tokens}], got {list(token_ids.shape)}")
        step = self._cached_step(batch)
        x = self._embed(token_ids[step.plan.order])
        for layer, block in enumerate(self.blocks):
            x = block(x, step.past(layer))
        step.commit()
        wanted = step.plan.order if all_logits else step.plan.sequences
        logits = self._logits(x if all_logits else x[step.plan.last])
        return torch.empty_like(logits).index_copy_(0, wanted, logits)

    def _embed(self, token_ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(token_ids)
        return x.to(compute_dtype(self.dtype))

    def _logits(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.head is not None:
            logits: Tensor = self.head(x)
            return logits * self.logit_scale
        weight = self.embedding.weight
        return F.linear(x.to(weight.dtype), weight).to(x.dtype) * self.logit_scale

    @abstractmethod
    def _whole_past(self, token_ids: Tensor) -> object:
        """What the blocks are given where all tokens [batch, time] of whole sequences come at once."""

    @abstractmethod
    def _cached_step(self, batch: MemoryBatch) -> Step:
        """What gives the blocks the past of the sequences of `batch`."""
