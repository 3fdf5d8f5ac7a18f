"""What the gateway may load."""

from __future__ import annotations

import subprocess
import sys


def test_the_gateway_loads_neither_torch_nor_ray() -> None:
    code = "import service.gateway.app, sys; sys.exit(', '.join({'torch', 'ray', 'numpy'} & sys.modules.keys()) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stderr.strip() == ""
    assert result.returncode == 0
