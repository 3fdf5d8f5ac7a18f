"""Servers that share the engines of one application in a cluster, as they know of each other.

Each has an actor there, which Ray ends with the server's process, however that ends. Who comes or goes does so in turn.
The actor is on the server's machine, and reads the server's model for replicas elsewhere.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from service.errors import EngineStartError, UsageError
from service.model_copies import MODEL_FILES
from service.model_offer import ModelOffer

_NAMESPACE = "tessera"
_ANSWER_TIMEOUT_S = 60.0
_GONE_TIMEOUT_S = 3.0
_POLL_S = 0.05


class _Presence:
    """The actor of one server: that it is there, how it wants the engines to be, and the model that it has."""

    def __init__(self, terms: Mapping[str, object], model: Path | None) -> None:
        self._terms = terms
        self._offer = ModelOffer(model, MODEL_FILES)

    def terms(self) -> Mapping[str, object]:
        return self._terms

    def sizes(self) -> Mapping[str, int]:
        return self._offer.sizes()

    def piece(self, name: str, offset: int) -> bytes:
        return self._offer.piece(name, offset)


class _Turn:
    """An actor whose name one server at a time can have."""


class Frontend:
    """This process as one of the servers of an application. All methods block, and want Ray to be initialised.

    `terms` are what has to be the same for all of them, by the names under which users know them. `model` is a model's
    directory that replicas may ask for, if any.
    """

    def __init__(self, app_name: str, terms: Mapping[str, object], model: Path | None = None) -> None:
        self._app_name = app_name
        self._terms = terms
        self._model = model
        self._name = f"{app_name}:{uuid.uuid4().hex}"
        self._presence: Any = None

    def join(self, deploy: Callable[[], None]) -> bool:
        """Becomes one of the servers; calls `deploy` where no other's application is there. False: not our turn yet.

        Raises UsageError, naming what differs, where the others' terms are not the same.
        """
        with self._turn() as is_ours:
            if not is_ours:
                return False
            is_there = self._app_name in serve.status().applications
            terms = self._terms_of_others() if is_there else None
            if terms is not None and (differences := _differences(terms, self._terms)):
                raise UsageError(f"another server has started these engines otherwise: {differences}")
            self._presence = _start(_Presence, self._name, self._terms, self._model)
            if terms is None:
                deploy()
            return True

    def leave(self) -> bool:
        """Is none of the servers any more; the last one ends the application. False: not our turn yet."""
        if self._presence is None:
            return True
        with self._turn() as is_ours:
            if not is_ours:
                return False
            if not self._others():
                serve.delete(self._app_name)
            ray.kill(self._presence)
            self._presence = None
            # Until then whoever goes next would take us for there, and leave the engines to us.
            deadline_s = time.monotonic() + _GONE_TIMEOUT_S
            while self._name in _names() and time.monotonic() < deadline_s:
                time.sleep(_POLL_S)
            return True

    @contextmanager
    def _turn(self) -> Generator[bool, None, None]:
        """Whether nobody else comes or goes until the end of the block."""
        try:
            turn = _start(_Turn, f"turn:{self._app_name}")
        except ValueError:  # The name is taken.
            yield False
            return
        try:
            yield True
        finally:
            ray.kill(turn)

    def _others(self) -> list[str]:
        return [name for name in _names_of(self._app_name) if name != self._name]

    def _terms_of_others(self) -> Mapping[str, object] | None:
        """What the others have agreed on; None where there is none."""
        for name in self._others():
            try:
                actor: Any = ray.get_actor(name, _NAMESPACE)
                terms: Mapping[str, object] = ray.get(actor.terms.remote(), timeout=_ANSWER_TIMEOUT_S)
            except (ValueError, RayActorError):
                continue  # It has just ended.
            except GetTimeoutError as error:
                raise EngineStartError("another server of these engines does not answer") from error
            return terms
        return None


def presences(app_name: str) -> list[Any]:
    """The actors of all servers of an application."""
    actors = []
    for name in _names_of(app_name):
        with suppress(ValueError):  # It has just ended.
            actors.append(ray.get_actor(name, _NAMESPACE))
    return actors


def _start(kind: type, name: str, *args: object) -> Any:
    """An actor beside this process that ends with it. Raises ValueError where another has the name."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": name, "namespace": _NAMESPACE, "num_cpus": 0, "scheduling_strategy": here}
    return ray.remote(kind).options(**options).remote(*args)


def _names_of(app_name: str) -> list[str]:
    return [name for name in _names() if name.startswith(f"{app_name}:")]


def _names() -> list[str]:
    actors = list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == _NAMESPACE]


def _differences(theirs: Mapping[str, object], ours: Mapping[str, object]) -> str:
    names = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    return ", ".join(f"{name} is {theirs.get(name)} there and {ours.get(name)} here" for name in names)
