"""Training speed against plain torch: python -m tests.model.training.speed [--layers 6 --width 384 --pmem 896 ...]

Forwards and backwards of one micro-batch under bfloat16 autocast, or with --float32 without it, the forms one after
another in rounds, on one thread; tokens per second of processor time, so that a busy machine disturbs it little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import training
from model.mosaic_v1 import MemoryMosaic
from model.presets import mosaic_of
from tests.model.plain import plain_logits


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("layers", 6), ("heads", 8), ("width", 384), ("pmem", 896), ("window", 512), ("rounds", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 anywhere, as processors without it need")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = mosaic_of(
        vocab_size=4096, n_layer=options.layers, n_head=options.heads, n_embd=options.width, pmem_size=options.pmem
    )
    model = MemoryMosaic(config)
    token_ids = torch.randint(4096, (4, options.window + 1))
    forms: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
        "plain torch, float32 memories": (lambda ids: plain_logits(dict(model.named_parameters()), config, ids), False),
        "plain torch, all in bfloat16": (lambda ids: plain_logits(dict(model.named_parameters()), config, ids), False),
        "model, plain torch": (model, False),
        "model, kernels": (model, True),
    }
    if options.float32:
        del forms["plain torch, all in bfloat16"]
    best = dict.fromkeys(forms, float("inf"))
    for _ in range(options.rounds):
        for name, (forward, has_kernels) in forms.items():
            is_narrow = not options.float32 and "float32" not in name
            best[name] = min(best[name], _time(model, forward, token_ids, has_kernels, is_narrow))
    for name, seconds in best.items():
        print(f"{name:32}{4 * options.window / seconds:8.0f} tokens/s")


def _time(model: MemoryMosaic, forward: Callable[[Tensor], Tensor], ids: Tensor, kernels: bool, narrow: bool) -> float:
    model.zero_grad()
    path = nullcontext() if kernels else mock.patch.object(training, "is_supported", return_value=False)
    start = time.process_time()
    with path:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            logits = forward(ids[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
    return time.process_time() - start


if __name__ == "__main__":
    main()
