"""Checkpoints in the published formats, made up at any option, and their logits by the definition.

`published_logits` works on the published names and stored numbers, token by token and in float64, so that it shares
nothing with the converter or the model; `test_convert` holds it against what the published code computed.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Checkpoint = dict[str, Any]

LIBRARY_ARGUMENTS: dict[str, Any] = {
    "vocab_size": 41, "n_layer": 2, "n_head": 3, "n_embd": 12, "block_size": 16, "v_shift": 1, "att_shift": 0,
    "pmem_size": 7, "pmem_count": 1, "bias": False, "weight_tying": True, "pre_ln": True, "k_kernel_size": 1,
    "v_kernel_size": 2, "k_fe_type": "linearconv", "v_fe_type": "lowrlinearconv", "skip_tokens": 0, "attn_only": False,
    "dataset": "BabiStories", "learning_rate": 5e-3, "milestone": [10000],
}  # fmt: skip
NANO_ARGUMENTS: dict[str, Any] = {
    "vocab_size": 41, "n_layer": 2, "n_head": 3, "n_embd": 12, "block_size": 16, "pmem_size": 7, "pmem_count": 1,
    "bias": False, "dropout": 0.0,
}  # fmt: skip


def library_checkpoint(
    *, eft: bool = False, prefix: str = "", log_scale: float = 0.2, crowded: bool = False, **options: Any
) -> Checkpoint:
    """What Library's training script would save with these arguments, its weights random.

    `crowded` keys lie so close together that the largest scales still tell them apart by degrees.
    """
    arguments = {**LIBRARY_ARGUMENTS, **options, "bias": options.get("bias", crowded)}
    generator = torch.Generator().manual_seed(7)
    channels, heads, vocab = arguments["n_embd"], arguments["n_head"], arguments["vocab_size"]
    state: dict[str, Tensor] = {}

    def normal(name: str, *shape: int, std: float = 1.0, mean: float = 0.0) -> None:
        state[name] = torch.randn(shape, generator=generator) * std + mean

    def affine(name: str, *shape: int, std: float, mean: float = 0.0, bias: bool = arguments["bias"]) -> None:
        normal(f"{name}.weight", *shape, std=std, mean=mean)
        if bias:
            normal(f"{name}.bias", shape[0], std=0.5)

    def key(name: str) -> None:
        normal(f"{name}.kernel_beta", heads, std=log_scale)
        if eft:
            normal(f"{name}.leaky_average.leaky_beta_w_under", heads, std=0.1)
            state[f"{name}.leaky_average.leaky_beta_u_under"] = state[f"{name}.leaky_average.leaky_beta_w_under"]
            affine(f"{name}.leaky_average.linear", channels, channels, std=channels**-0.5)
        else:
            normal(f"{name}.leaky_key_beta", heads, std=0.1)
            affine(f"{name}.k_featurizer.conv", channels, channels, 1, std=channels**-0.5)

    normal("emb.weight", vocab, channels)
    for n in range(arguments["n_layer"]):
        attention, persistent = f"blocks.{n}.attn", f"blocks.{n}.pmem"
        affine(f"blocks.{n}.ln1", channels, std=0.3, mean=1)
        key(attention)
        normal(f"{attention}.value_beta", heads, std=0.1)
        if arguments["v_fe_type"] == "linearconv":
            affine(f"{attention}.v_featurizer.conv", channels, channels, 2, std=channels**-0.5)
        else:
            state[f"{attention}.v_featurizer.coef"] = torch.rand(heads, generator=generator)
            affine(f"{attention}.v_featurizer.linear", channels, channels, std=channels**-0.5)
        affine(f"{attention}.c_proj", channels, channels, std=channels**-0.5)
        if not arguments["attn_only"]:
            affine(f"blocks.{n}.ln2", channels, std=0.3, mean=1)
            key(persistent)
            normal(f"{persistent}.value_beta", heads, std=0.1)
            for bank in range(arguments["pmem_count"]):
                for side in ("k", "v"):
                    normal(f"{persistent}.pmem.M_{side}{bank}", 1, heads, arguments["pmem_size"], channels // heads)
            affine(f"{persistent}.c_proj", channels, channels, std=channels**-0.5)
    affine("ln_out", channels, std=0.3, mean=1)
    if arguments["weight_tying"]:
        state["head.weight"] = state["emb.weight"]
    else:
        normal("head.weight", vocab, channels)
    if crowded:
        _crowd(state, ("k_featurizer.conv.bias", "leaky_average.linear.bias"), "pmem.M_k")
    named = {prefix + name: tensor for name, tensor in state.items()}
    return {"model": named, "optimizer": {}, "model_args": arguments, "iter_num": 1000}


def nano_checkpoint(*, prefix: str = "", log_scale: float = 0.2, crowded: bool = False, **options: Any) -> Checkpoint:
    """What nanoMosaics' training script would save with these arguments, its weights random, buffers included."""
    arguments = {**NANO_ARGUMENTS, **options, "bias": options.get("bias", crowded)}
    generator = torch.Generator().manual_seed(8)
    channels, heads, block = arguments["n_embd"], arguments["n_head"], arguments["block_size"]
    state: dict[str, Tensor] = {}

    def normal(name: str, *shape: int, std: float = 1.0, mean: float = 0.0) -> None:
        state[name] = torch.randn(shape, generator=generator) * std + mean

    def affine(name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        normal(f"{name}.weight", *shape, std=std, mean=mean)
        if arguments["bias"]:
            normal(f"{name}.bias", shape[0], std=0.5)

    def key(name: str) -> None:
        normal(f"{name}.key_scale", 1, heads, 1, 1, std=log_scale)
        normal(f"{name}.leaky_avg.leaky_key_beta", 1, heads, 1, 1, std=0.1)
        state[f"{name}.leaky_avg.coef"] = torch.zeros(block, block)
        affine(f"{name}.W_k", channels, channels, std=channels**-0.5)

    normal("mosaic.wte.weight", arguments["vocab_size"], channels, std=channels**-0.5)
    state["lm_head.weight"] = state["mosaic.wte.weight"]
    for n in range(arguments["n_layer"]):
        block_name = f"mosaic.h.{n}"
        state[f"{block_name}.attn.bias"] = torch.ones(1, 1, block, block).tril(-1).bool()
        affine(f"{block_name}.ln_1", channels, std=0.3, mean=1)
        key(f"{block_name}.attn.k_featurizer")
        state[f"{block_name}.attn.v_featurizer.coef"] = torch.rand(1, heads, 1, 1, generator=generator)
        normal(f"{block_name}.attn.v_featurizer.val_scale", 1, heads, 1, 1, std=0.1)
        affine(f"{block_name}.attn.v_featurizer.W_v", channels, channels, std=channels**-0.5)
        affine(f"{block_name}.attn.c_proj", channels, channels, std=channels**-0.5)
        affine(f"{block_name}.ln_2", channels, std=0.3, mean=1)
        key(f"{block_name}.mlp.k_featurizer")
        bank = (arguments["pmem_count"], 1, heads, arguments["pmem_size"], channels // heads)
        normal(f"{block_name}.mlp.P_k", *bank)
        normal(f"{block_name}.mlp.P_v", *bank)
        normal(f"{block_name}.mlp.out_scale", 1, heads, 1, 1, std=0.1)
        affine(f"{block_name}.mlp.c_proj", channels, channels, std=channels**-0.5)
    affine("mosaic.ln_f", channels, std=0.3, mean=1)
    if crowded:
        _crowd(state, ("k_featurizer.W_k.bias",), "mlp.P_k")
    return {
        "model": {prefix + name: tensor for name, tensor in state.items()},
        "optimizer": {},
        "model_args": arguments,
        "iter_num": 1000,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "openwebtext", "model_type": "mosaic"},
    }


def _crowd(state: dict[str, Tensor], biases: tuple[str, ...], bank: str) -> None:
    for name, tensor in state.items():
        if name.endswith(biases):
            tensor *= 300
        if bank in name:
            tensor *= 1e-4


def published_logits(checkpoint: Checkpoint, tokens: Tensor, nano_bound: float = math.log(65535)) -> Tensor:
    """Logits [time, vocab] in float64 of one sequence of token ids [time], by the definition."""
    state = {name.removeprefix("_orig_mod."): t.double() for name, t in checkpoint["model"].items()}
    if "mosaic.wte.weight" in state:
        return _nano_logits(state, checkpoint["model_args"], tokens, nano_bound)
    return _library_logits(state, checkpoint["model_args"], tokens)


def _library_logits(state: Mapping[str, Tensor], arguments: Mapping[str, Any], tokens: Tensor) -> Tensor:
    heads = arguments["n_head"]
    x = [state["emb.weight"][token] for token in tokens]

    def keys(name: str, inputs: list[Tensor]) -> list[Tensor]:
        if f"{name}.leaky_average.linear.weight" in state:
            matrix, bias = state[f"{name}.leaky_average.linear.weight"], state.get(f"{name}.leaky_average.linear.bias")
            leak = state[f"{name}.leaky_average.leaky_beta_w_under"]
        else:
            matrix, bias = (
                state[f"{name}.k_featurizer.conv.weight"][..., 0],
                state.get(f"{name}.k_featurizer.conv.bias"),
            )
            leak = state[f"{name}.leaky_key_beta"]
        return _unit_averages([_apply(matrix, bias, u) for u in inputs], 10 * leak.abs(), heads, 0.0)

    def attention(name: str, inputs: list[Tensor]) -> list[Tensor]:
        values = []
        for now, then in pairwise(inputs):
            if arguments["v_fe_type"] == "linearconv":
                kernel, bias = state[f"{name}.v_featurizer.conv.weight"], state.get(f"{name}.v_featurizer.conv.bias")
                value = kernel[..., 0] @ now + _apply(kernel[..., 1], bias, then)
            else:
                linear = state[f"{name}.v_featurizer.linear.weight"], state.get(f"{name}.v_featurizer.linear.bias")
                coef = state[f"{name}.v_featurizer.coef"].repeat_interleave(len(now) // heads)
                value = (1 - coef) * _apply(*linear, then) + coef * _apply(*linear, now)
            values.append(_unit(value.view(heads, -1), 0.0))
        scale = (10 * state[f"{name}.kernel_beta"]).clamp(max=5).exp() ** 2
        out = _read_past(keys(name, inputs), values, scale, (10 * state[f"{name}.value_beta"]).exp())
        return [_apply(state[f"{name}.c_proj.weight"], state.get(f"{name}.c_proj.bias"), y) for y in out]

    def persistent(name: str, inputs: list[Tensor]) -> list[Tensor]:
        banks = range(arguments["pmem_count"])
        pairs = [(state[f"{name}.pmem.M_k{bank}"][0], state[f"{name}.pmem.M_v{bank}"][0]) for bank in banks]
        scale = (10 * state[f"{name}.kernel_beta"]).clamp(max=5).exp() ** 2
        out = _read_banks(keys(name, inputs), pairs, scale, (10 * state[f"{name}.value_beta"]).exp())
        return [_apply(state[f"{name}.c_proj.weight"], state.get(f"{name}.c_proj.bias"), y) for y in out]

    for n in range(arguments["n_layer"]):
        memories = [("ln1", "attn", attention), ("ln2", "pmem", persistent)]
        for norm, name, memory in memories[:1] if arguments["attn_only"] else memories:
            normed = [_layer_norm(state, f"blocks.{n}.{norm}", u) for u in x]
            stream = x if arguments["pre_ln"] else normed
            x = [u + y for u, y in zip(stream, memory(f"blocks.{n}.{name}", normed), strict=True)]
    out = [state["head.weight"] @ _layer_norm(state, "ln_out", u) for u in x]
    return torch.stack(out) / math.sqrt(arguments["n_embd"])


def _nano_logits(state: Mapping[str, Tensor], arguments: Mapping[str, Any], tokens: Tensor, bound: float) -> Tensor:
    heads = arguments["n_head"]
    x = [state["mosaic.wte.weight"][token] for token in tokens]

    def linear(name: str, u: Tensor) -> Tensor:
        return _apply(state[f"{name}.weight"], state.get(f"{name}.bias"), u)

    def keys(name: str, inputs: list[Tensor]) -> list[Tensor]:
        leak = 10 * state[f"{name}.leaky_avg.leaky_key_beta"].flatten().abs()
        return _unit_averages([linear(f"{name}.W_k", u) for u in inputs], leak, heads, 1e-10)

    for n in range(arguments["n_layer"]):
        name = f"mosaic.h.{n}.attn"
        normed = [_layer_norm(state, f"mosaic.h.{n}.ln_1", u) for u in x]
        projected = [linear(f"{name}.v_featurizer.W_v", u).view(heads, -1) for u in normed]
        coef = state[f"{name}.v_featurizer.coef"].view(heads, 1)
        values = [_unit((1 - coef) * then + coef * now, 1e-10) for now, then in pairwise(projected)]
        scale = (10 * state[f"{name}.k_featurizer.key_scale"].flatten()).clamp(max=bound).exp() ** 2
        gain = (10 * state[f"{name}.v_featurizer.val_scale"].flatten()).exp()
        read = _read_past(keys(f"{name}.k_featurizer", normed), values, scale, gain)
        x = [u + linear(f"{name}.c_proj", y) for u, y in zip(x, read, strict=True)]

        name = f"mosaic.h.{n}.mlp"
        normed = [_layer_norm(state, f"mosaic.h.{n}.ln_2", u) for u in x]
        pairs = [
            (state[f"{name}.P_k"][bank, 0], state[f"{name}.P_v"][bank, 0]) for bank in range(arguments["pmem_count"])
        ]
        scale = (20 * state[f"{name}.k_featurizer.key_scale"].flatten()).clamp(max=bound).exp()
        gain = (10 * state[f"{name}.out_scale"].flatten()).exp()
        read = _read_banks(keys(f"{name}.k_featurizer", normed), pairs, scale, gain)
        x = [u + linear(f"{name}.c_proj", y) for u, y in zip(x, read, strict=True)]
    return torch.stack([state["lm_head.weight"] @ _layer_norm(state, "mosaic.ln_f", u) for u in x])


def _apply(matrix: Tensor, bias: Tensor | None, u: Tensor) -> Tensor:
    return matrix @ u if bias is None else matrix @ u + bias


def _layer_norm(state: Mapping[str, Tensor], name: str, u: Tensor) -> Tensor:
    centred = u - u.mean()
    normed = centred / (centred.square().mean() + 1e-5).sqrt() * state[f"{name}.weight"]
    return normed + state[f"{name}.bias"] if f"{name}.bias" in state else normed


def _unit(u: Tensor, eps: float) -> Tensor:
    return u / (u.square().sum(-1, keepdim=True).sqrt() + eps)


def _unit_averages(projected: list[Tensor], leak: Tensor, heads: int, eps: float) -> list[Tensor]:
    """Directions [heads, dim] of sum_{i<=t} exp(-leak (t-i)) u_i."""
    sums = []
    for t in range(len(projected)):
        terms = [(-leak * (t - i)).exp()[:, None] * projected[i].view(heads, -1) for i in range(t + 1)]
        sums.append(_unit(torch.stack(terms).sum(0), eps))
    return sums


def _read_past(keys: list[Tensor], values: list[Tensor], scale: Tensor, gain: Tensor) -> list[Tensor]:
    """At each t the pairs before it; nothing at the first."""
    out = [torch.zeros_like(keys[0]).flatten()]
    for t in range(1, len(keys)):
        past = torch.stack(keys[:t], 1), torch.stack(values[:t], 1)
        out.append((_smooth(keys[t], *past, scale) * gain[:, None]).flatten())
    return out


def _read_banks(keys: list[Tensor], pairs: list[tuple[Tensor, Tensor]], scale: Tensor, gain: Tensor) -> list[Tensor]:
    reads = [torch.stack([_smooth(key, *bank, scale) for bank in pairs]).mean(0) for key in keys]
    return [(read * gain[:, None]).flatten() for read in reads]


def _smooth(key: Tensor, keys: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """Kernel smoothing per head: key [heads, dim], pairs [heads, count, dim] -> [heads, dim]."""
    weights = torch.softmax((keys * key[:, None]).sum(-1) * scale[:, None], dim=-1)
    return (weights[..., None] * values).sum(1)
