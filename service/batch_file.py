"""Files of many requests and their answers, a JSON object a line, as OpenAI's batch API has them. Knows no engine."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import UsageError
from service.repeated_keys import repeated_key

_MAX_TOLD = 5
_ID_PREFIX = "batch_req_"
_LINE_START = f'{{"id":"{_ID_PREFIX}'.encode()


class BatchLine(BaseModel):
    """A line of the input: one request and the name its answer is found by."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    custom_id: str = Field(min_length=1, max_length=512)
    method: Literal["POST"]
    url: Literal["/v1/completions"]
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the file a line begins, and how long it is."""

    custom_id: str
    start: int
    num_bytes: int


class BatchInput:
    """The requests of a file, checked whole before the first is read; only their names are kept in memory."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError that names the lines that cannot be used."""
        self.path = path
        self._places: list[_Place] = []
        wrong: list[str] = []
        seen: dict[str, int] = {}
        try:
            with path.open("rb") as file:
                start = 0
                for number, raw in enumerate(file, start=1):
                    place = _Place("", start, len(raw))
                    start += len(raw)
                    if raw.strip():
                        problem = self._take(raw, place, number, seen)
                        wrong += [f"line {number}: {problem}"] if problem else []
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error
        if wrong:
            more = f"; and {len(wrong) - _MAX_TOLD} more" if len(wrong) > _MAX_TOLD else ""
            raise UsageError(f"{path}: {'; '.join(wrong[:_MAX_TOLD])}{more}")
        if not self._places:
            raise UsageError(f"{path}: there are no requests in it")

    def __len__(self) -> int:
        return len(self._places)

    @property
    def custom_ids(self) -> set[str]:
        return {place.custom_id for place in self._places}

    def lines(self, without: set[str]) -> Iterator[BatchLine]:
        """The requests in their order, less those named in `without`."""
        with self.path.open("rb") as file:
            for place in self._places:
                if place.custom_id not in without:
                    file.seek(place.start)
                    yield BatchLine.model_validate(orjson.loads(file.read(place.num_bytes)))

    def _take(self, raw: bytes, place: _Place, number: int, seen: dict[str, int]) -> str | None:
        """Notes a line; what is wrong with it, if anything is."""
        try:
            line = BatchLine.model_validate(orjson.loads(raw))
            if (key := repeated_key(raw, {})) is not None:
                return f"{key!r} is there more than once"
        except RecursionError:
            return "nested too deeply"
        except orjson.JSONDecodeError as error:
            return f"not JSON ({error.msg})"
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in first["loc"])
            return f"'{name}': {first['msg']}" if name else "must be a JSON object"
        if line.body.get("stream"):
            return "'body.stream': a batch is not streamed"
        if line.custom_id in seen:
            return f"'custom_id' is that of line {seen[line.custom_id]}"
        seen[line.custom_id] = number
        self._places.append(_Place(line.custom_id, place.start, place.num_bytes))
        return None


class BatchOutput:
    """The answers, in the order in which they came. Context manager.

    What an interrupted run has left is kept, but for a last line that was not written whole.
    """

    def __init__(self, path: Path) -> None:
        """Raises UsageError where the file is none of a batch's answers."""
        self.path = path
        self.custom_ids: set[str] = set()
        try:
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def write(self, custom_id: str, status: int, request_id: str, body: bytes) -> None:
        """Appends an answer; `body` is a JSON document."""
        response = {"status_code": status, "request_id": request_id, "body": orjson.Fragment(body)}
        line = {
            "id": f"{_ID_PREFIX}{secrets.token_hex(12)}",
            "custom_id": custom_id,
            "response": response,
            "error": None,
        }
        self._file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        self._file.flush()
        self.custom_ids.add(custom_id)

    def _read(self) -> None:
        self._file.seek(0)
        end = 0
        for raw in self._file:
            if not raw.endswith(b"\n"):
                self._require_torn(raw)
                break
            end += len(raw)
            if raw.strip():
                self.custom_ids.add(self._custom_id(raw))
        self._file.truncate(end)

    def _require_torn(self, raw: bytes) -> None:
        """Nothing is cut off that was not written here."""
        if raw[: len(_LINE_START)] != _LINE_START[: len(raw)]:
            raise self._is_strange()

    def _custom_id(self, raw: bytes) -> str:
        try:
            return str(orjson.loads(raw)["custom_id"])
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise self._is_strange() from error

    def _is_strange(self) -> UsageError:
        return UsageError(f"{self.path} holds something else than a batch's answers: choose another file")
