"""The checkpoint of a replica: its machine's own where that is the right one, else a copy that a server sends.

Which one is right the servers have said when they started the engines; whatever is loaded has been compared with that.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from model.fingerprint import Identity
from service.config import EngineConfig
from service.errors import ModelNotFoundError
from service.model_copies import ModelCopies, copies_directory, holds
from service.model_offer import PIECE_BYTES
from service.ray_engine import ServedEngine, load_engine
from service.ray_frontends import presences
from service.startup import explained

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 60.0
# On their way at once: enough to keep a network busy, little enough for the smallest of object stores.
_NUM_PIECES_AHEAD = 4


@dataclass(frozen=True, slots=True)
class LoadChecked:
    """A `LoadEngine` for the replicas of one application, which loads `identity` and nothing else.

    `max_copy_bytes` is how much of copies a machine may keep; 0 for none, so that the checkpoint has to be there.
    """

    app_name: str
    identity: Identity
    max_copy_bytes: int

    def __call__(self, config: EngineConfig, replica: str) -> ServedEngine:
        """Raises CommandError."""
        with explained():
            directory = Path(config.model_dir)
            if not holds(directory, self.identity):
                directory = self._copy(directory)
        config = replace(config, model_dir=str(directory), fingerprint=self.identity.fingerprint)
        return load_engine(config, replica)

    def _copy(self, missing: Path) -> Path:
        here = f"the checkpoint at {missing} on {os.uname().nodename} is missing or another than {self.identity}"
        if not self.max_copy_bytes:
            raise ModelNotFoundError(f"{here}, and --model-copies is 0")
        logger.warning("%s: taking a copy", here)
        return ModelCopies(copies_directory(), self.max_copy_bytes).lend(self.identity, _Servers(self.app_name, here))


class _Servers:
    """The servers of an application as the source of their checkpoint: any of them, since all have the same."""

    def __init__(self, app_name: str, reason: str) -> None:
        self._actors = presences(app_name)
        self._reason = reason
        self._sizes: Mapping[str, int] = {}

    def sizes(self) -> Mapping[str, int]:
        """See `Source.sizes`."""
        while not self._sizes:
            actor = self._actor()
            try:
                self._sizes = ray.get(actor.sizes.remote(), timeout=_ANSWER_TIMEOUT_S)
            except RayError as error:
                self._give_up(actor, error)
            else:
                if not self._sizes:  # what is there is no file, or not for Ray's processes to read
                    self._actors.remove(actor)
        return self._sizes

    def pieces(self, name: str) -> Iterator[bytes]:
        """See `Source.pieces`. Where a server ends, another goes on."""
        offset = 0
        while offset < self._sizes[name]:
            actor = self._actor()
            try:
                for piece in _stream(actor, name, offset, self._sizes[name]):
                    if not piece:  # The file has become shorter.
                        return
                    offset += len(piece)
                    yield piece
            except RayError as error:
                self._give_up(actor, error)

    def _actor(self) -> Any:
        if not self._actors:
            raise ModelNotFoundError(f"{self._reason}, and no server is there that could send it")
        return self._actors[0]

    def _give_up(self, actor: Any, error: RayError) -> None:
        logger.warning("a server does not send its checkpoint: %s", type(error).__name__)
        self._actors.remove(actor)


def _stream(actor: Any, name: str, offset: int, end: int) -> Iterator[bytes]:
    """A file's pieces from `offset` on, of which a few are on their way at any time."""
    ahead: deque[Any] = deque()
    for start in range(offset, end, PIECE_BYTES):
        ahead.append(actor.piece.remote(name, start))
        if len(ahead) == _NUM_PIECES_AHEAD:
            yield ray.get(ahead.popleft(), timeout=_ANSWER_TIMEOUT_S)
    while ahead:
        yield ray.get(ahead.popleft(), timeout=_ANSWER_TIMEOUT_S)
