"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes tells of the machine's other work.
settings.register_profile("tessera", deadline=None)
settings.load_profile("tessera")
