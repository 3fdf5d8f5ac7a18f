"""The state of a run: everything that the next step depends on, as safetensors and JSON.

A state is a directory of its own that appears whole; the one before it goes only then.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TENSORS_FILE = "state.safetensors"
FACTS_FILE = "state.json"
_PREFIX = "step-"


@dataclass(frozen=True)
class Progress:
    """How far a run is. The order of the data and the random numbers of a step follow from these and the seed."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Time spent in them."""
    best: float | None = None
    """Smallest validation loss so far."""


def save_state(
    directory: Path,
    network: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    progress: Progress,
    fixed: Mapping[str, Any],
) -> None:
    """Writes weights, moments and progress under `directory`, then removes what was there before."""
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for optimiser in optimisers:
        names = _names(network, optimiser)
        for number, moments in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{kind}.{names[number]}": tensor for kind, tensor in moments.items()}
    target = directory / f"{_PREFIX}{progress.step:08d}"
    partial = directory / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, partial / TENSORS_FILE
    )
    facts = {"progress": vars(progress), "fixed": fixed}
    (partial / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    before = [path for path in _states(directory) if path != target]
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for path in before:
        shutil.rmtree(path)


def load_state(
    directory: Path, network: nn.Module, optimisers: Sequence[torch.optim.Optimizer], fixed: Mapping[str, Any]
) -> Progress:
    """Restores the latest state under `directory`; the beginning where there is none.

    Raises ValueError where the state belongs to a recipe with another network, other data or another batch, or is
    damaged.
    """
    states = _states(directory)
    if not states:
        return Progress()
    latest = states[-1]
    try:
        facts = json.loads((latest / FACTS_FILE).read_text(encoding="utf-8"))
        tensors = load_file(latest / TENSORS_FILE)
        _check_fixed(facts["fixed"], json.loads(json.dumps(fixed)))
        network.load_state_dict({n.removeprefix("network."): t for n, t in tensors.items() if n.startswith("network.")})
        for optimiser in optimisers:
            _load_optimiser(network, optimiser, tensors)
        return Progress(**facts["progress"])
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{latest}: {error}") from error


def has_state(directory: Path) -> bool:
    """Whether there is anything to go on from."""
    return bool(_states(directory))


def _states(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"{_PREFIX}*"))


def _names(network: nn.Module, optimiser: torch.optim.Optimizer) -> list[str]:
    """Names of the parameters in the optimiser's order."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [names[id(parameter)] for group in optimiser.param_groups for parameter in group["params"]]


def _load_optimiser(network: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    numbers = {name: number for number, name in enumerate(_names(network, optimiser))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.removeprefix("optimiser.").partition(".")
        if key.startswith("optimiser.") and name in numbers:
            state.setdefault(numbers[name], {})[kind] = tensor
    for number, parameter in enumerate(p for group in optimiser.param_groups for p in group["params"]):
        for kind, tensor in state.get(number, {}).items():
            # The optimiser trusts its state and would write past the end of a smaller one.
            if tensor.ndim and tensor.shape != parameter.shape:
                raise ValueError(f"{kind} has shape {list(tensor.shape)}, its parameter {list(parameter.shape)}")
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _check_fixed(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if (difference := _difference(before, now)) is not None:
        raise ValueError(f"{difference} is not what the run began with; give this one another run.directory")


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> str | None:
    """The first key in which two nested mappings differ."""
    for key in sorted({*before, *now}):
        one, other = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            if (found := _difference(one, other, f"{path}{key}.")) is not None:
                return found
        elif one != other:
            return f"{path}{key}"
    return None
