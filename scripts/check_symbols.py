"""Checks that a built library asks nothing of PyTorch but its stable C interface: one build then serves every later PyTorch,
with CUDA or without.

    python scripts/check_symbols.py proac_cuda/_C.abi3.so      # a library, or a wheel with libraries in it

Needs ``nm``, ``c++filt`` and ``readelf`` (binutils). Exits with 1, and the list, where it finds a C++ symbol of PyTorch or of
Python, or a library that not every PyTorch has.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

STABLE = re.compile(r"(aoti_)?torch_\w+")
# C++ of PyTorch's namespaces, or of pybind11, anywhere in a symbol; and Python's C interface, which the library does not use
UNSTABLE = re.compile(r"\b(at|c10|torch|caffe2|pybind11)::|^_?Py[A-Z]")

# Libraries that are missing where PyTorch has no CUDA, or another version of it, and those of one Python
UNCERTAIN = re.compile(r"lib(torch_cuda|c10_cuda|cudart|cuda|torch_python|python)\b.*")


def needed_libraries(library: Path) -> list[str]:
    """Names of the libraries that are loaded with it."""
    listed = subprocess.run(["readelf", "--dynamic", "--wide", library], check=True, capture_output=True, text=True)
    return re.findall(r"\(NEEDED\).*\[(.+)\]", listed.stdout)


def undefined_symbols(library: Path) -> list[str]:
    """Names that the library asks of others, demangled, without their versions."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True
    ).stdout
    names = [line.split()[-1].partition("@")[0] for line in listed.splitlines()]
    return subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )


def check(library: Path) -> list[str]:
    """The unstable symbols and uncertain libraries of a library; a line on the terminal says what was found."""
    symbols = undefined_symbols(library)
    stable = [symbol for symbol in symbols if STABLE.fullmatch(symbol)]
    unstable = [symbol for symbol in symbols if UNSTABLE.search(symbol)]
    uncertain = [name for name in needed_libraries(library) if UNCERTAIN.fullmatch(name)]
    print(
        f"{library.name}: {len(stable)} symbols of PyTorch's stable interface, {len(unstable)} others of PyTorch or Python, "
        f"{len(uncertain)} libraries that not every PyTorch has"
    )
    for name in unstable + uncertain:
        print(f"    {name}")
    if not stable:
        raise SystemExit(f"{library}: asks nothing of PyTorch at all; is this the right library?")
    return unstable + uncertain


def main() -> int:
    unstable = []
    with tempfile.TemporaryDirectory() as folder:
        for path in map(Path, sys.argv[1:]):
            if path.suffix == ".whl":
                zipfile.ZipFile(path).extractall(folder)
                libraries = sorted(Path(folder).rglob("*.so"))
            else:
                libraries = [path]
            if not libraries:
                raise SystemExit(f"{path}: no library in it")
            for library in libraries:
                unstable += check(library)
    return bool(unstable)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    sys.exit(main())
