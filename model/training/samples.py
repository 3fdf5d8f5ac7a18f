"""Completions during training, to be read: sampled with the whole text recomputed for every token."""

from __future__ import annotations

import torch
from torch import nn

from model.tokenizer import Tokenizer

TOKENS, TEMPERATURE, TOP_K = 80, 0.7, 40


@torch.no_grad()
def complete(
    network: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    window: int,
    device: torch.device,
    *,
    seed: int = 0,
    tokens: int = TOKENS,
) -> str:
    """The prompt's continuation, up to `tokens` or the end of the text; the same for the same weights and seed.

    The network sees the last `window` tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt_ids = tokenizer.encode(prompt)
    ids = list(prompt_ids)
    was_training = network.training
    network.eval()
    for _ in range(tokens):
        logits = network(torch.tensor([ids[-window:]], device=device))[0, -1, : tokenizer.vocab_size].float().cpu()
        best, candidates = torch.topk(logits / TEMPERATURE, min(TOP_K, logits.shape[0]))
        drawn = int(candidates[torch.multinomial(torch.softmax(best, 0), 1, generator=generator)])
        if drawn == tokenizer.eos_token_id:
            break
        ids.append(drawn)
    network.train(was_training)
    return tokenizer.decode(ids[len(prompt_ids) :])
