"""The version of this package."""

from __future__ import annotations

from importlib import metadata


def package_version() -> str:
    """As installed; "0+unknown" when run from a tree that is not."""
    try:
        return metadata.version("tessera-mosaics")
    except metadata.PackageNotFoundError:
        return "0+unknown"
