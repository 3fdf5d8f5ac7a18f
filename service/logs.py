"""How log lines look and where they go: one line each, on stderr."""

from __future__ import annotations

import logging

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure_logging(level: str) -> None:
    """Sets up the root logger for this process. Chatter of the HTTP server is shown when debugging only."""
    logging.basicConfig(level=level.upper(), format=_FORMAT, force=True)
    if level == "info":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
