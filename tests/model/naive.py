"""A Memory Mosaic token by token, straight from the equations: slow, plain, sharing nothing with `model`'s layers.

One sequence at a time, with Python loops over tokens, heads, banks and stored pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import MosaicConfig


def naive_logits(state: Mapping[str, Tensor], config: MosaicConfig, token_ids: list[int]) -> Tensor:
    """Logits [time, vocab_size] after every token; computed in float64."""
    weights = {name: tensor.double() for name, tensor in state.items()}
    stream = [weights["embedding.weight"][token_id] for token_id in token_ids]
    for layer in range(config.n_layer):
        block = _Block(weights, config, f"blocks.{layer}.")
        normed = [block.norm("contextual_norm", x) for x in stream]
        base = stream if config.pre_norm else normed
        stream = [x + y for x, y in zip(base, block.contextual(normed), strict=True)]
        if config.has_persistent:
            normed = [block.norm("persistent_norm", x) for x in stream]
            base = stream if config.pre_norm else normed
            stream = [x + y for x, y in zip(base, block.persistent(normed), strict=True)]
    final = _Block(weights, config, "")
    head = weights["embedding.weight" if config.tied else "head.weight"]
    return torch.stack([head @ final.norm("norm", x) * config.logit_scale for x in stream])


class _Block:
    def __init__(self, weights: Mapping[str, Tensor], config: MosaicConfig, prefix: str) -> None:
        self.config = config
        self.heads = range(config.n_head)
        self.weights = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean()
        y = centred / torch.sqrt((centred**2).mean() + 1e-5) * self.weights[f"{name}.weight"]
        return y + self.weights[f"{name}.bias"] if self.config.bias else y

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = self.weights[f"{name}.weight"] @ x
        return y + self.weights[f"{name}.bias"] if self.config.bias else y

    def unit(self, x: Tensor) -> Tensor:
        return x / (math.sqrt(float((x**2).sum())) + self.config.norm_eps)

    def head(self, x: Tensor, h: int) -> Tensor:
        size = self.config.n_embd // self.config.n_head
        return x[h * size : (h + 1) * size]

    def keys(self, name: str, xs: list[Tensor]) -> list[list[Tensor]]:
        """[time][head] unit keys."""
        average = torch.zeros_like(xs[0])
        keys = []
        for x in xs:
            projected = self.linear(f"{name}.projection", x)
            parts = []
            for h in self.heads:
                decay = math.exp(-abs(10 * float(self.weights[f"{name}.leak"][h])))
                # `Library` has a factor 1 - decay here, which matters only beside an epsilon, and it has none.
                parts.append(decay * self.head(average, h) + self.head(projected, h))
            average = torch.cat(parts)
            keys.append([self.unit(self.head(average, h)) for h in self.heads])
        return keys

    def value(self, x: Tensor, following: Tensor, h: int) -> Tensor:
        """The value of head h's pair of a token, which needs the token after it."""
        name = "contextual.value"
        if self.config.value_extractor == "lowrlinearconv":
            mix = self.weights[f"{name}.mix"][h]
            own, ahead = (self.head(self.linear(f"{name}.projection", y), h) for y in (x, following))
            raw = (1 - mix) * ahead + mix * own
        else:
            raw = self.weights[f"{name}.current.weight"] @ x + self.weights[f"{name}.next.weight"] @ following
            raw = self.head(raw + self.weights[f"{name}.bias"] if self.config.bias else raw, h)
        return math.exp(10 * float(self.weights[f"{name}.log_scale"][h])) * self.unit(raw)

    def contextual(self, xs: list[Tensor]) -> list[Tensor]:
        keys = self.keys("contextual.key", xs)
        outputs = []
        for t, x in enumerate(xs):
            read = []
            for h in self.heads:
                scale = math.exp(
                    min(10 * float(self.weights["contextual.key.log_scale"][h]), self.config.key_log_scale_max)
                )
                stored = [(scale * keys[i][h], self.value(xs[i], xs[i + 1], h)) for i in range(t)]
                read.append(_smooth(scale * keys[t][h], stored) if stored else torch.zeros_like(self.head(x, h)))
            outputs.append(self.linear("contextual.output", torch.cat(read)))
        return outputs

    def persistent(self, xs: list[Tensor]) -> list[Tensor]:
        outputs = []
        for key in self.keys("persistent.key", xs):
            read = []
            for h in self.heads:
                log_scale = 20 * float(self.weights["persistent.key.log_scale"][h])
                query = math.exp(min(log_scale, self.config.persistent_key_log_scale_max)) * key[h]
                banks = [
                    _smooth(query, list(zip(bank_keys[h], bank_values[h], strict=True)))
                    for bank_keys, bank_values in zip(
                        self.weights["persistent.keys"], self.weights["persistent.values"], strict=True
                    )
                ]
                mean = sum(banks[1:], start=banks[0]) / len(banks)
                read.append(math.exp(10 * float(self.weights["persistent.log_scale"][h])) * mean)
            outputs.append(self.linear("persistent.output", torch.cat(read)))
        return outputs


def _smooth(query: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    logits = [float(query @ key) for key, _ in pairs]
    weights = [math.exp(logit - max(logits)) for logit in logits]
    total = torch.zeros_like(pairs[0][1])
    for weight, (_, value) in zip(weights, pairs, strict=True):
        total = total + weight / sum(weights) * value
    return total
