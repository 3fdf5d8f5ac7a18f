"""Who is measured against whom: servers of one shape, and of one width of weights each with its own kind."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.peers import llama_cpp, vllm
from loadtests.peers.environment import Environment, InstallError
from loadtests.shape import MAX_MODEL_LEN, Shape

TOOLS = "gguf==0.19.0"
TRANSFORMER = Path(__file__).with_name("transformer.py")
USERS = 32


@dataclass(frozen=True, slots=True)
class Contest:
    """Tessera, called `ours`, and the peers with weights as wide."""

    width: str
    ours: str
    peers: tuple[str, ...]


CONTESTS = (
    Contest("bfloat16", "tessera", ("vllm", "llama.cpp")),
    Contest("int8", "tessera-int8", ("llama.cpp-q8_0",)),
)
"""vLLM has no counterpart to q8_0 that it makes of any model by itself."""


@dataclass(slots=True)
class Peers:
    """What is installed under a directory, and why the rest is not."""

    directory: Path
    missing: dict[str, str] = field(default_factory=dict)

    def install(self) -> None:
        """Whatever can be. The tools, with which their models are written, have to be: raises InstallError."""
        self._tools()
        for name, peer in ((vllm.NAME, vllm), (llama_cpp.NAME, llama_cpp)):
            print(f"{name}: installing {peer.VERSION} unless it is there", file=sys.stderr, flush=True)
            try:
                peer.install(self.directory)
            except InstallError as error:
                self.missing[name] = str(error)

    def commands(self, shape: Shape) -> Mapping[str, str]:
        """Of every server that can take part, by name, with `{port}` in it. Writes the transformer on first use."""
        model = self.transformer(shape)
        sizes = {"max_num_seqs": USERS, "max_model_len": MAX_MODEL_LEN}
        found = {"tessera": shape.tessera("bfloat16", max_num_seqs=USERS)}
        if vllm.NAME not in self.missing:
            found["vllm"] = vllm.command(self.directory, model / "hugging-face", **sizes)
        if llama_cpp.NAME not in self.missing:
            found["llama.cpp"] = llama_cpp.command(self.directory, model / "bf16.gguf", **sizes)
        found["tessera-int8"] = shape.tessera("int8", max_num_seqs=USERS)
        if llama_cpp.NAME not in self.missing:
            found["llama.cpp-q8_0"] = llama_cpp.command(self.directory, model / "q8_0.gguf", **sizes)
        return found

    def _tools(self) -> Environment:
        environment = Environment(self.directory / "tools")
        if not environment.is_complete(TOOLS):
            environment.create()
            environment.pip("install", TOOLS)
            environment.complete(TOOLS)
        return environment

    def transformer(self, shape: Shape) -> Path:
        """Its directory; written on first use. Raises InstallError."""
        path = shape.models.absolute() / f"{shape.preset}-transformer"
        if not (path / "q8_0.gguf").exists():
            tools = self._tools()
            tools.run([str(tools.bin / "python"), str(TRANSFORMER), str(path), "--like", str(shape.model)])
        return path
