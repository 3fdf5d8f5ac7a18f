"""A Memory Mosaic of the second version, token by token from the equations: slow, plain, sharing nothing with `model`.

One sequence at a time, with Python loops over tokens, heads and stored pairs. Differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import MosaicV2Config


def naive_v2_logits(state: Mapping[str, Tensor], config: MosaicV2Config, token_ids: list[int], delay: int) -> Tensor:
    """Logits [time, vocab_size] after every token; computed in float64."""
    weights = {name: tensor.double() for name, tensor in state.items()}
    stream = [weights["embedding.weight"][token_id] for token_id in token_ids]
    for layer in range(config.n_layer):
        block = _Block(weights, config, f"blocks.{layer}.", delay)
        read = block.contextual([block.norm("contextual_norm", x) for x in stream])
        stream = [x + y for x, y in zip(stream, read, strict=True)]
        stream = [x + block.persistent(block.norm("persistent_norm", x)) for x in stream]
    final = _Block(weights, config, "", delay)
    return torch.stack([weights["head.weight"] @ final.norm("norm", x) for x in stream])


class _Block:
    def __init__(self, weights: Mapping[str, Tensor], config: MosaicV2Config, prefix: str, delay: int) -> None:
        self.config, self.delay = config, delay
        self.weights = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean()
        return centred / torch.sqrt((centred**2).mean() + 1e-5) * self.weights[f"{name}.weight"]

    def persistent(self, x: Tensor) -> Tensor:
        gate = self.weights["persistent.gate.weight"] @ x
        return self.weights["persistent.down.weight"] @ (
            gate / (1 + torch.exp(-gate)) * (self.weights["persistent.up.weight"] @ x)
        )

    def contextual(self, xs: list[Tensor]) -> list[Tensor]:
        read: list[list[Tensor]] = [[] for _ in xs]
        for memory in ("short", "long"):
            for h in range(self.config.n_head):
                keys = self.keys(memory, h, xs)
                values = [self.value(memory, h, xs[i], xs[i + 1]) for i in range(len(xs) - 1)]
                for t in range(len(xs)):
                    pairs = self.visible(memory, t)
                    if pairs:
                        beta = self.beta(memory, h, len(pairs))
                        read[t].append(_smooth(beta, keys[t], [(keys[i], values[i]) for i in pairs]))
                    else:
                        read[t].append(torch.zeros_like(keys[t]))
        return [self.weights["contextual.output.weight"] @ torch.cat(parts) for parts in read]

    def visible(self, memory: str, t: int) -> list[int]:
        if memory == "short":
            return [i for i in range(t - self.config.short_window + 1, t) if i >= 0]
        return [i for i in range(t) if i <= t - self.delay]

    def rows(self, name: str, h: int) -> Tensor:
        size = self.config.n_embd // self.config.n_head
        return self.weights[name][h * size : (h + 1) * size]

    def scalar(self, name: str, h: int) -> Tensor:
        return self.weights[name][h]

    def keys(self, memory: str, h: int, xs: list[Tensor]) -> list[Tensor]:
        name = f"contextual.{memory}.key"
        total = torch.zeros(self.config.n_embd // self.config.n_head, dtype=torch.float64)
        keys = []
        for x in xs:
            gate = torch.exp(self.weights[f"{name}.gate.weight"][h] @ x)
            decay = torch.exp(-torch.abs(self.weights[f"{name}.decay.weight"][h] @ x))
            total = gate * (self.rows(f"{name}.projection.weight", h) @ x) + decay * total
            keys.append(_unit(total))
        return keys

    def value(self, memory: str, h: int, x: Tensor, following: Tensor) -> Tensor:
        name = f"contextual.{memory}.value"
        mix, projection = self.scalar(f"{name}.mix", h), self.rows(f"{name}.projection.weight", h)
        raw = mix * (projection @ x) + (1 - mix) * (projection @ following)
        return torch.exp(torch.clamp(torch.abs(self.scalar(f"{name}.log_scale", h)), max=15)) * _unit(raw)

    def beta(self, memory: str, h: int, n: int) -> Tensor:
        name = f"contextual.{memory}.bandwidth"
        beta0, beta1 = (
            torch.exp(torch.clamp(self.scalar(f"{name}.{beta}", h), max=10)) for beta in ("log_beta0", "log_beta1")
        )
        alpha = torch.clamp(torch.abs(self.scalar(f"{name}.alpha", h)), max=1)
        return beta1 * torch.exp(alpha * math.log(n)) + beta0


def _unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).sum())


def _smooth(beta: Tensor, key: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """E[V | K = key], straight from the Gaussian kernel on unit keys: exp(-beta/2 |k - k_i|^2) is exp(beta k.k_i)."""
    logits = [beta * (key @ stored) for stored, _ in pairs]
    highest = max(float(logit.detach()) for logit in logits)
    weights = [torch.exp(logit - highest) for logit in logits]
    total = sum(weights[1:], start=weights[0])
    read = torch.zeros_like(pairs[0][1])
    for weight, (_, value) in zip(weights, pairs, strict=True):
        read = read + weight / total * value
    return read
