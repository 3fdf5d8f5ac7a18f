"""Builds the CPU kernels where there is a C++ compiler; without one, plain torch serves. The rest: pyproject.toml."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("model/kernels/cpu")
# Contraction off: a path's arithmetic is what its source says, the same in every function that inlines it.
FLAGS = ["-O3", "-std=c++20", "-pthread", "-ffp-contract=off", "-g0", "-w"]


class BuildKernels(build_ext):
    """Compiles the instruction sets' variants at the same time: each takes several seconds."""

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler.compile

        def compile_all(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor() as pool:
                parts = pool.map(lambda source: compile_one([source], **options), sources)
                return [name for part in parts for name in part]

        self.compiler.compile = compile_all
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "model.kernels._mosaic_cpu",
            sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for pattern in ("*.h", "*.inl") for path in SOURCES.glob(pattern)),
            language="c++",
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
