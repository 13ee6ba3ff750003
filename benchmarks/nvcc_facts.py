"""What nvcc made of the CUDA kernels: registers, local memory, shared memory, resident warps, and what the machine code does.

    python -m benchmarks.nvcc_facts [library]

reads the compiled extension (proac_cuda/_C*.so), for every architecture in it. Nothing is compiled and nothing runs.
cuobjdump and nvdisasm come from the CUDA toolkit or from Triton's wheel.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# Of a multiprocessor: registers, shared memory, threads; and the most shared memory that a block may ask for.
MACHINES = {
    80: (65536, 164 << 10, 2048, 163 << 10),
    90: (65536, 228 << 10, 2048, 227 << 10),
    100: (65536, 228 << 10, 2048, 227 << 10),
    120: (65536, 100 << 10, 1536, 99 << 10),
}
RESERVED = 1 << 10  # shared memory that the system takes for each block


class Row(NamedTuple):
    """One kernel on one architecture. ``shared`` and ``warps`` (resident, of a multiprocessor) at D = 256."""

    architecture: int
    kernel: str
    registers: int
    local: int  #: bytes of stack and local memory of a thread: spills
    shared: int
    warps: int
    wide_copies: int  #: asynchronous copies of 16 bytes, global to shared
    wide_stores: int  #: global stores of 16 bytes
    tensor_core: int
    local_accesses: int


def library() -> Path | None:
    """The compiled extension in the source tree, or of the package that is installed."""
    found = sorted((ROOT / "proac_cuda").glob("_C*.so"))
    return found[0] if found else None


def find_tool(name: str) -> str | None:
    """cuobjdump or nvdisasm, from the toolkit or from Triton's wheel."""
    tool = shutil.which(name)
    if tool:
        return tool
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" / name
    return str(bundled) if bundled.is_file() else None


def architectures(path: Path) -> list[int]:
    """Those that the library has machine code for."""
    try:
        text = _run(path, "--list-elf")
    except subprocess.CalledProcessError as error:  # as some releases of cuobjdump take a library without any
        if "does not contain device code" in error.stdout + error.stderr:
            return []
        raise
    return sorted({int(a) for a in re.findall(r"\.sm_(\d+)\.cubin", text)})


def rows(path: Path) -> Iterator[Row]:
    """The fast path's kernels (fast_*), then the others, for each architecture of the library."""
    launches = _launches()
    for architecture in architectures(path):
        usage = _usage(path, architecture)
        code = _code(path, architecture)
        for kernel in sorted(usage, key=lambda name: ("fast_" not in name, name)):
            registers, local, static = usage[kernel]
            if architecture >= 90:  # there the tool counts what the system takes, too, but for a few kernels
                static = max(static - RESERVED, 0)
            threads, dynamic = launches.get((architecture, kernel), (256, 0))
            counts = code.get(kernel, {})
            yield Row(
                architecture,
                kernel,
                registers,
                local,
                static + dynamic,
                _resident_warps(architecture, registers, static + dynamic, threads),
                *(counts.get(name, 0) for name in ("copies", "stores", "tensor", "local")),
            )


def _run(path: Path, *arguments: str, tool: str = "cuobjdump", folder: str | None = None) -> str:
    found = find_tool(tool)
    if found is None:
        raise RuntimeError(f"no {tool}: install the CUDA toolkit, or Triton")
    command = [found, *arguments, str(path.resolve())]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def _short(mangled: str) -> str:
    """fast_gradients_kernel<bfloat16, 24 classes, rows> of a mangled name."""
    match = re.match(r"_ZN5proac4cuda\d+([a-z_]+)_kernel(?:I(.*)E+v)?", mangled)
    if not match:
        return mangled
    name, arguments = match[1], match[2] or ""
    words = [word for key, word in {"__half": "float16", "__nv_bfloat16": "bfloat16"}.items() if key in arguments]
    if not words and arguments[:1] in "fd" and arguments:
        words = ["float32" if arguments[0] == "f" else "float64"]
    size = re.search(r"Li(\d+)E", arguments)
    if size:
        words.append(f"{8 * int(size[1])} classes")
    if "Lb" in arguments:
        words.append("channels_last" if "Lb1" in arguments else "planes")
    return f"{name}<{', '.join(words)}>" if words else name


def _usage(path: Path, architecture: int) -> dict[str, tuple[int, int, int]]:
    text = _run(path, "-arch", f"sm_{architecture}", "--dump-resource-usage")
    found = {}
    for name, line in re.findall(r"Function (\S+):\n\s*(REG:.*)", text):
        values = {key: int(value) for key, value in re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", line)}
        found[_short(name)] = (values["REG"], values["STACK"] + values["LOCAL"], values["SHARED"])
    return found


COUNTED = re.compile(
    r"(?P<copies>LDGSTS\.E\S*\.128)|(?P<stores>STG\.E\S*\.128)|(?P<tensor>\b[HD]MMA\.)|(?P<local>\b(?:LDL|STL)\b)"
)


def _code(path: Path, architecture: int) -> dict[str, dict[str, int]]:
    """Instructions of each kind by kernel. The disassembler by itself, without its analysis, is twice as fast as cuobjdump."""
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        _run(path, "--extract-elf", f"sm_{architecture}", folder=folder)
        for cubin in sorted(Path(folder).iterdir()):
            counts: dict[str, int] = {}
            for line in _run(cubin, "--no-dataflow", "--print-code", tool="nvdisasm").splitlines():
                if line.startswith(".text."):
                    name = _short(line.removeprefix(".text.").removesuffix(":"))
                    counts = found.setdefault(name, dict.fromkeys(COUNTED.groupindex, 0))
                elif match := COUNTED.search(line):
                    counts[str(match.lastgroup)] += 1
    return found


def _resident_warps(architecture: int, registers: int, shared: int, threads: int) -> int:
    all_registers, all_shared, all_threads, _ = MACHINES[architecture]
    warps = threads // 32
    by_registers = all_registers // (-(-registers * 32 // 256) * 256) // warps
    return warps * min(by_registers, all_shared // (shared + RESERVED), all_threads // threads)


def _launches() -> dict[tuple[int, str], tuple[int, int]]:
    """Threads and dynamic shared memory of the fast path's launches at D = 256, from the launchers themselves."""
    try:
        import numpy as np

        sys.path.append(str(ROOT / "tests"))

        from cuda_on_cpu.stages import module
    except ImportError:  # no g++, or no pybind11: the launchers cannot be asked
        return {}
    found = {}
    module.take_launches()  # those of whoever used the module before in this process
    for architecture, (*_, limit) in MACHINES.items():
        module.set_options(shared_limit=limit)
        for type_, classes in ((t, k) for t in ("float16", "bfloat16", "float32") for k in (19, 64, 150)):
            dtype = np.float32 if type_ == "float32" else np.float16 if type_ == "float16" else np.uint16
            for order in "CF":
                x = np.zeros((1, 256, 16), dtype, order="C" if order == "C" else "F")
                labels, p = np.full((1, 16), 255, np.uint8), np.ones((classes, 256), np.float32)
                statistics, positive, _ = module.class_statistics(
                    x, type_, labels, None, p, None, None, 0.1, 255, False, False, False
                )
                sums = module.positive_sums(positive, labels, None, statistics, 255, False, False)
                one = np.ones((), np.float32)
                module.loss_gradients(
                    x,
                    type_,
                    labels,
                    None,
                    p,
                    None,
                    None,
                    statistics,
                    sums,
                    None,
                    one,
                    0.1,
                    255,
                    False,
                    0.0,
                    1,
                    False,
                    x.copy(order="K"),
                    None,
                )
                for name, _, threads, shared, _ in module.take_launches():
                    if "fast_" in name:
                        found[architecture, _short(name)] = (threads, shared)
    module.set_options()
    return found


def main() -> None:
    """Print the table."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else library()
    if path is None:
        raise SystemExit("no compiled extension; build it first: pip install --no-build-isolation .")
    print(f"| {' | '.join(name.replace('_', ' ') for name in Row._fields)} |\n|{'---|' * len(Row._fields)}")
    for row in rows(path):
        print(f"| sm_{' | '.join(map(str, row))} |")


if __name__ == "__main__":
    main()
