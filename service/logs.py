"""How log lines look and where they go: one line each, on stderr, as text or as JSON."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

# The id of the HTTP request that the current task works for.
current_request_id: ContextVar[str | None] = ContextVar("current_request_id", default=None)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (UTC), `level`, `logger`, `request_id` where the line belongs to one, `message`.

    A record with a mapping `fields` has those in place of the message; its `id` is the request's.
    """

    def format(self, record: logging.LogRecord) -> str:
        import orjson

        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {"time": time, "level": record.levelname.lower(), "logger": record.name}
        if (request_id := current_request_id.get()) is not None:
            line["request_id"] = request_id
        fields = getattr(record, "fields", None)
        if fields is None:
            line["message"] = record.getMessage()
        else:
            line |= {"request_id" if name == "id" else name: value for name, value in fields.items()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def configure_logging(level: str, log_format: LogFormat = "text") -> None:
    """Sets up the root logger for this process. Chatter of the HTTP server is shown when debugging only.

    As JSON, warnings of libraries and errors that nobody catches are log lines, too.
    """
    logging.basicConfig(level=level.upper(), format=_FORMAT, force=True)
    if level == "info":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
    if log_format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
        logging.captureWarnings(True)
        sys.excepthook = lambda *exc_info: logging.getLogger("tessera").critical("uncaught error", exc_info=exc_info)


def is_json() -> bool:
    """Whether this process writes its log as JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)
