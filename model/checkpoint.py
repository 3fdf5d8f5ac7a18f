"""A model's directory: config.json and model.safetensors, read with suspicion and written whole.

Shapes in the file's header are checked against the configuration before any memory is taken for weights.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.config import NetworkConfig
from model.factory import build_network
from model.fingerprint import CONFIG_FILE, WEIGHTS_FILE, fingerprint
from model.network import MosaicNetwork

# Of the longest network a configuration may describe the header takes a tenth of this.
_MAX_HEADER_BYTES = 16 << 20
_FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}


def expected_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this configuration stores."""
    return {name: tuple(tensor.shape) for name, tensor in _skeleton(config).state_dict().items()}


def load_model(
    directory: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MosaicNetwork:
    """The model stored in `directory`, in evaluation mode and without gradients, its weights as `dtype`.

    Scales, decays and norms are never narrower than float32. Raises FileNotFoundError if a file is missing and
    ValueError if the files are damaged, do not fit together, or hold numbers that are not finite as `dtype`.
    """
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected a floating point type of 16 bits or more, got {dtype}")
    directory = Path(directory)
    config = NetworkConfig.load(directory / CONFIG_FILE)
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with ThreadPoolExecutor(1) as hashing:
        digest = hashing.submit(fingerprint, directory, config)
        model = _load_weights(path, config, torch.device(device), dtype)
        model.fingerprint = digest.result()
    return model


def save_model(
    model: nn.Module | Mapping[str, Tensor], config: NetworkConfig, directory: str | os.PathLike[str]
) -> None:
    """Writes the weights and `config` into `directory`, which is made if need be; files there are replaced.

    Raises ValueError, naming the tensor, if the weights are not those of the configuration.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    _check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, config)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    # Each file appears complete or not at all; the configuration last, so that it never describes other weights.
    partial_weights, partial_config = directory / f".{WEIGHTS_FILE}.partial", directory / f".{CONFIG_FILE}.partial"
    config.save(partial_config)
    save_file(weights, partial_weights, metadata={"format": "pt"})
    # safetensors leaves its file to the owner alone; the directory's readers may read the configuration.
    shutil.copymode(partial_config, partial_weights)
    partial_weights.replace(directory / WEIGHTS_FILE)
    partial_config.replace(directory / CONFIG_FILE)


def _skeleton(config: NetworkConfig) -> MosaicNetwork:
    with torch.device("meta"):
        return build_network(config)


def _load_weights(path: Path, config: NetworkConfig, device: torch.device, dtype: torch.dtype) -> MosaicNetwork:
    model = _skeleton(config).cast_weights(dtype)
    try:
        _check_header_size(path)
        with safe_open(path, framework="pt") as file:
            headers = {name: file.get_slice(name) for name in list(file.keys())}
            _check_shapes({name: tuple(header.get_shape()) for name, header in headers.items()}, config)
            _check_types({name: header.get_dtype() for name, header in headers.items()})
            weights = {}
            for name, tensor in model.state_dict().items():
                weights[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                weights[name].copy_(file.get_tensor(name))
                _check_finite(name, weights[name])
            model.load_state_dict(weights, assign=True)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return model.eval().requires_grad_(False)


def _check_header_size(path: Path) -> None:
    """The library reads a header of up to 100 MB into several times as much memory."""
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
    if num_bytes > _MAX_HEADER_BYTES:
        raise ValueError(f"its header is {num_bytes} bytes long, at most {_MAX_HEADER_BYTES} are read")


def _check_shapes(found: Mapping[str, tuple[int, ...]], config: NetworkConfig) -> None:
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"tensor {name!r} is missing")
        if found[name] != shape:
            raise ValueError(f"tensor {name!r} has shape {list(found[name])}, the configuration asks for {list(shape)}")
    if unexpected := sorted(set(found) - set(expected)):
        raise ValueError(f"tensor {unexpected[0]!r} has no place in this configuration")


def _check_types(found: Mapping[str, str]) -> None:
    for name, kind in found.items():
        if kind not in _FLOAT_TYPES:
            raise ValueError(f"tensor {name!r} is of type {kind}, expected one of {', '.join(sorted(_FLOAT_TYPES))}")


def _check_finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"tensor {name!r} holds numbers that are not finite as {tensor.dtype}")
