"""The machine a result was measured on, without anything that names its owner."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from loadtests.procfs import usable_cores


@dataclass(frozen=True, slots=True)
class Machine:
    """What a reader needs to compare two results."""

    cpu_model: str
    cpu_flags: tuple[str, ...]
    num_cores: int
    num_usable_cores: int
    memory_gib: float
    kernel: str
    python: str

    def described(self) -> dict[str, object]:
        return asdict(self)


_TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")


def read_machine() -> Machine:
    cpu = _first_processor(Path("/proc/cpuinfo").read_text(errors="replace"))
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return Machine(
        cpu_model=cpu.get("model name") or platform.processor() or platform.machine(),
        cpu_flags=tuple(flag for flag in _TELLING_FLAGS if flag in flags),
        num_cores=os.cpu_count() or 0,
        num_usable_cores=len(usable_cores()),
        memory_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def _first_processor(cpuinfo: str) -> dict[str, str]:
    first = cpuinfo.split("\n\n")[0]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
