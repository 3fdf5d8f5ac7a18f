"""Where each of our weights lies in a published checkpoint, and its shape there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import MosaicConfig
from model.published import ConversionError, PublishedFormat, summary

Build = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Weight:
    """One of our tensors: the published tensors it is made from, all of one shape, and how."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    build: Build


def convert_weights(layout: PublishedFormat, config: MosaicConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict, float32, from a published one without prefixes; may share memory with it.

    ConversionError names the tensors that are missing, unknown, of the wrong shape or not finite.
    """
    weights = list(_nano(config) if layout is PublishedFormat.NANO else _library(config, layout))
    shapes = {source: weight.shape for weight in weights for source in weight.sources}
    if missing := shapes.keys() - tensors.keys():
        raise ConversionError(f"missing tensors: {summary(missing)}")
    if unknown := {name for name in tensors if name not in shapes and not _is_buffer(layout, name)}:
        raise ConversionError(f"unknown tensors: {summary(unknown)}")
    for source, shape in shapes.items():
        _check_tensor(source, tensors[source], shape, config)
    return {weight.name: _built(weight, tensors) for weight in weights}


def _built(weight: Weight, tensors: Mapping[str, Tensor]) -> Tensor:
    try:
        return weight.build([tensors[source].detach().float() for source in weight.sources])
    except _DifferError:
        raise ConversionError(f"{' and '.join(weight.sources)} differ, but should be one parameter") from None


def _library(config: MosaicConfig, layout: PublishedFormat) -> Iterator[Weight]:
    channels = (config.n_embd,)
    yield from _embedding(config, "emb.weight", "head.weight")
    yield from _parameters("norm", "ln_out", channels, config.bias)
    for n in range(config.n_layer):
        ours, theirs = f"blocks.{n}", f"blocks.{n}"
        yield from _parameters(f"{ours}.contextual_norm", f"{theirs}.ln1", channels, config.bias)
        yield from _library_key(config, layout, f"{ours}.contextual.key", f"{theirs}.attn")
        yield from _library_value(config, f"{ours}.contextual.value", f"{theirs}.attn")
        yield from _linear(config, f"{ours}.contextual.output", f"{theirs}.attn.c_proj")
        if config.has_persistent:
            yield from _parameters(f"{ours}.persistent_norm", f"{theirs}.ln2", channels, config.bias)
            yield from _library_key(config, layout, f"{ours}.persistent.key", f"{theirs}.pmem")
            yield from _library_banks(config, f"{ours}.persistent", f"{theirs}.pmem")
            yield from _linear(config, f"{ours}.persistent.output", f"{theirs}.pmem.c_proj")


def _library_key(config: MosaicConfig, layout: PublishedFormat, ours: str, theirs: str) -> Iterator[Weight]:
    heads, channels = config.n_head, config.n_embd
    yield _copy(f"{ours}.log_scale", f"{theirs}.kernel_beta", (heads,))
    if layout is PublishedFormat.LIBRARY_EFT:
        average = f"{theirs}.leaky_average"
        both = (f"{average}.leaky_beta_w_under", f"{average}.leaky_beta_u_under")
        yield Weight(f"{ours}.leak", both, (heads,), _same)
        yield from _linear(config, f"{ours}.projection", f"{average}.linear")
        return
    yield _copy(f"{ours}.leak", f"{theirs}.leaky_key_beta", (heads,))
    conv = f"{theirs}.k_featurizer.conv"
    yield Weight(f"{ours}.projection.weight", (f"{conv}.weight",), (channels, channels, 1), _kernel(0))
    if config.bias:
        yield _copy(f"{ours}.projection.bias", f"{conv}.bias", (channels,))


def _library_value(config: MosaicConfig, ours: str, theirs: str) -> Iterator[Weight]:
    channels, featurizer = config.n_embd, f"{theirs}.v_featurizer"
    yield _copy(f"{ours}.log_scale", f"{theirs}.value_beta", (config.n_head,))
    if config.value_extractor == "lowrlinearconv":
        yield _copy(f"{ours}.mix", f"{featurizer}.coef", (config.n_head,))
        yield from _linear(config, f"{ours}.projection", f"{featurizer}.linear")
        return
    kernel = (channels, channels, 2)
    yield Weight(f"{ours}.current.weight", (f"{featurizer}.conv.weight",), kernel, _kernel(0))
    yield Weight(f"{ours}.next.weight", (f"{featurizer}.conv.weight",), kernel, _kernel(1))
    if config.bias:
        yield _copy(f"{ours}.bias", f"{featurizer}.conv.bias", (channels,))


def _library_banks(config: MosaicConfig, ours: str, theirs: str) -> Iterator[Weight]:
    yield _copy(f"{ours}.log_scale", f"{theirs}.value_beta", (config.n_head,))
    shape = (1, config.n_head, config.pmem_size, config.head_dim)
    for name, prefix in (("keys", "M_k"), ("values", "M_v")):
        banks = tuple(f"{theirs}.pmem.{prefix}{bank}" for bank in range(config.pmem_count))
        yield Weight(f"{ours}.{name}", banks, shape, _joined)


def _nano(config: MosaicConfig) -> Iterator[Weight]:
    channels = (config.n_embd,)
    yield from _embedding(config, "mosaic.wte.weight", "lm_head.weight")
    yield from _parameters("norm", "mosaic.ln_f", channels, config.bias)
    for n in range(config.n_layer):
        ours, theirs = f"blocks.{n}", f"mosaic.h.{n}"
        yield from _parameters(f"{ours}.contextual_norm", f"{theirs}.ln_1", channels, config.bias)
        yield from _nano_key(config, f"{ours}.contextual.key", f"{theirs}.attn.k_featurizer")
        yield from _nano_value(config, f"{ours}.contextual.value", f"{theirs}.attn.v_featurizer")
        yield from _linear(config, f"{ours}.contextual.output", f"{theirs}.attn.c_proj")
        yield from _parameters(f"{ours}.persistent_norm", f"{theirs}.ln_2", channels, config.bias)
        yield from _nano_key(config, f"{ours}.persistent.key", f"{theirs}.mlp.k_featurizer")
        yield from _nano_banks(config, f"{ours}.persistent", f"{theirs}.mlp")
        yield from _linear(config, f"{ours}.persistent.output", f"{theirs}.mlp.c_proj")


def _nano_key(config: MosaicConfig, ours: str, theirs: str) -> Iterator[Weight]:
    yield _per_head(config, f"{ours}.log_scale", f"{theirs}.key_scale")
    yield _per_head(config, f"{ours}.leak", f"{theirs}.leaky_avg.leaky_key_beta")
    yield from _linear(config, f"{ours}.projection", f"{theirs}.W_k")


def _nano_value(config: MosaicConfig, ours: str, theirs: str) -> Iterator[Weight]:
    yield _per_head(config, f"{ours}.log_scale", f"{theirs}.val_scale")
    yield _per_head(config, f"{ours}.mix", f"{theirs}.coef")
    yield from _linear(config, f"{ours}.projection", f"{theirs}.W_v")


def _nano_banks(config: MosaicConfig, ours: str, theirs: str) -> Iterator[Weight]:
    yield _per_head(config, f"{ours}.log_scale", f"{theirs}.out_scale")
    shape = (config.pmem_count, 1, config.n_head, config.pmem_size, config.head_dim)
    for name, source in (("keys", "P_k"), ("values", "P_v")):
        yield Weight(f"{ours}.{name}", (f"{theirs}.{source}",), shape, lambda t: t[0].squeeze(1))


def _embedding(config: MosaicConfig, embedding: str, head: str) -> Iterator[Weight]:
    shape = (config.vocab_size, config.n_embd)
    if config.tied:
        yield Weight("embedding.weight", (embedding, head), shape, _same)
        return
    yield _copy("embedding.weight", embedding, shape)
    yield _copy("head.weight", head, shape)


def _linear(config: MosaicConfig, ours: str, theirs: str) -> Iterator[Weight]:
    yield _copy(f"{ours}.weight", f"{theirs}.weight", (config.n_embd, config.n_embd))
    if config.bias:
        yield _copy(f"{ours}.bias", f"{theirs}.bias", (config.n_embd,))


def _parameters(ours: str, theirs: str, shape: tuple[int, ...], has_bias: bool) -> Iterator[Weight]:
    for part in ("weight", "bias") if has_bias else ("weight",):
        yield _copy(f"{ours}.{part}", f"{theirs}.{part}", shape)


def _copy(ours: str, theirs: str, shape: tuple[int, ...]) -> Weight:
    return Weight(ours, (theirs,), shape, lambda tensors: tensors[0])


def _per_head(config: MosaicConfig, ours: str, theirs: str) -> Weight:
    return Weight(ours, (theirs,), (1, config.n_head, 1, 1), lambda tensors: tensors[0].flatten())


def _kernel(offset: int) -> Build:
    # One position of a convolution over time, [out, in, position].
    return lambda tensors: tensors[0][:, :, offset]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors))


class _DifferError(Exception):
    """Two tensors that the published code keeps as one parameter are not equal."""


def _same(tensors: Sequence[Tensor]) -> Tensor:
    if not torch.equal(tensors[0], tensors[1]):
        raise _DifferError
    return tensors[0]


def _is_buffer(layout: PublishedFormat, name: str) -> bool:
    # The causal mask and the table of exponents of nanoMosaics: recomputed by that code, not learned.
    return layout is PublishedFormat.NANO and name.endswith((".attn.bias", ".leaky_avg.coef"))


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], config: MosaicConfig) -> None:
    found = tuple(tensor.shape)
    if name.endswith("_under") and found == (config.n_embd,) != shape:
        raise ConversionError(f"{name} holds a leak per channel; only one per head is supported")
    if found != shape:
        raise ConversionError(f"{name} has shape {list(found)}, but model_args say {list(shape)}")
    if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_quantized:
        raise ConversionError(f"{name} is not a dense tensor of floating-point numbers ({tensor.dtype})")
    if not torch.isfinite(tensor.float()).all():
        raise ConversionError(f"{name} holds numbers that are not finite")
