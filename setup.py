"""Builds the compiled kernels: one library on PyTorch's stable ABI, for every Python >= 3.10 and PyTorch >= 2.10.

PyTorch is never imported here, and never a build requirement: the build needs the headers and libraries of the one that
is installed, and fetching a second one into an isolated environment would cost gigabytes.

Environment variables:
    PROAC_NO_EXT=1   install the pure-PyTorch reference only
    MAX_JOBS         compiler processes at a time; without it, one per core and per 2 GiB of memory that is available
    CXX, CXXFLAGS    compiler and extra flags
    PROAC_NO_CUDA=1  build no CUDA kernels, even if this PyTorch and this machine have CUDA
    PROAC_CUDA_ARCHITECTURES=80,90   for which GPUs; without it for those of this machine, or 80, 90, 100 and 120 where
                     there are none, and in any case PTX for all others from 80 on. Where it is set, CUDA kernels are
                     built even if this PyTorch has no CUDA
    CUDA_HOME        the CUDA toolkit, where nvcc is not on the path
    PROAC_SANITIZE=1 build with AddressSanitizer and UndefinedBehaviorSanitizer
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPU_SOURCES = ["csrc/ops.cpp", *(f"csrc/cpu/{name}.cpp" for name in ("stages", "gradient_stage", "select", "dispatch"))]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
ISA_FLAGS = {
    "csrc/cpu/isa_baseline.cpp": [],
    "csrc/cpu/isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/cpu/isa_avx512.cpp": AVX512_FLAGS,
    "csrc/cpu/isa_amx.cpp": [*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}
CUDA_ARCHITECTURES = (80, 90, 100, 120)  # those of them that nvcc knows
OLDEST_TORCH = (2, 10)
OLDEST_SETUPTOOLS = 77  # which reads the licence in pyproject.toml


def loudly(message: str) -> None:
    """Say it in the build log, and on the terminal too: pip shows the log of a build only where it fails."""
    line = "*" * 100
    text = f"\n{line}\nproac_cuda: {message}\n{line}\n"
    print(text, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(text, file=terminal, flush=True)


def find_torch() -> Path:
    """The folder of the PyTorch that is installed; in an isolated build, that of the environment which is installed into."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    prefixes = [os.environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX")] + [sys.prefix, sys.base_prefix]
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for prefix in filter(None, prefixes):
        folders += [f"{prefix}/lib/{version}/site-packages", f"{prefix}/lib/{version}/dist-packages"]
    for folder in folders:
        if Path(folder, "torch", "version.py").is_file():
            return Path(folder, "torch")
    raise SystemExit(
        "proac_cuda: found no PyTorch to build against. Install it first (https://pytorch.org), then run\n"
        "    pip install --no-build-isolation .\n"
        "or set PROAC_NO_EXT=1 for the pure-PyTorch reference without compiled kernels."
    )


def check_version(torch: Path) -> None:
    """Stop where that PyTorch is older than the stable ABI in use."""
    found = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
    if found and (int(found[1]), int(found[2])) < OLDEST_TORCH:
        raise SystemExit(
            f"proac_cuda: the compiled kernels need PyTorch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}, but {torch} is "
            f"{found[1]}.{found[2]}. Upgrade it and build with pip install --no-build-isolation, "
            "or set PROAC_NO_EXT=1 for the pure-PyTorch reference without compiled kernels."
        )


def compiler() -> str | None:
    """The C++ compiler, or None; the one asked for by CXX and no other."""
    if os.environ.get("CXX") and not shutil.which(os.environ["CXX"].split()[0]):
        raise stop("CXX", "a C++ compiler on the path")
    candidates = [os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "g++", "clang++", "c++"]
    for command in filter(None, candidates):
        if shutil.which(command.split()[0]):
            return command
    return None


def find_ninja() -> list[str]:
    """The command that runs ninja."""
    if shutil.which("ninja"):
        return ["ninja"]
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    raise SystemExit(
        "proac_cuda: found no ninja, which compiles the kernels. Run\n"
        "    pip install ninja\n"
        "and build again, or set PROAC_NO_EXT=1 for the pure-PyTorch reference without compiled kernels."
    )


def stop(name: str, expected: str) -> SystemExit:
    """The error for an environment variable that cannot be read."""
    return SystemExit(
        f"proac_cuda: the environment variable {name} is {os.environ[name]!r}, expected {expected}, or unset it."
    )


def flag(name: str) -> bool:
    """Whether an environment variable is set to yes."""
    value = os.environ.get(name, "").strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("", "0", "false", "no", "off"):
        return False
    raise stop(name, "1 or 0")


def architectures_of_this_machine(usual: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the usual ones whose machine code runs on the GPUs that nvidia-smi lists; all of them where it lists none."""
    query, listed = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # there is none, or its driver does not answer
        listed = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    here = {int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", listed, re.MULTILINE)}
    # machine code runs on GPUs of the same major version, from its minor one on
    return tuple(a for a in usual if any(a // 10 == gpu // 10 and a <= gpu for gpu in here)) or usual


def architectures_asked_for(known: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """For which GPUs machine code is made, and from which one on PTX serves the others.

    PROAC_CUDA_ARCHITECTURES, such as 80,90 or 8.0;9.0, each one that the kernels and nvcc know; if unset, the usual ones, or
    those of them that are here.
    """
    name = "PROAC_CUDA_ARCHITECTURES"
    asked = [word for word in re.split(r"[,;\s]+", os.environ.get(name, "")) if word]
    if not asked:
        usual = tuple(a for a in CUDA_ARCHITECTURES if a in known)
        return architectures_of_this_machine(usual), min(usual)
    expected = f"compute capabilities such as 80,90 or 8.0;9.0, from {', '.join(str(a) for a in known if a >= 80)}"
    if not all(re.fullmatch(r"\d+\.\d|\d{2,3}", word) for word in asked):
        raise stop(name, expected + ", without letters")
    architectures = tuple(dict.fromkeys(int(word.replace(".", "")) for word in asked))
    if not all(a >= min(CUDA_ARCHITECTURES) and a in known for a in architectures):
        raise stop(name, f"{expected}: the kernels need 80, and nvcc must know it")
    return architectures, min(architectures)


def max_jobs() -> int:
    """Compiler processes that fit in memory."""
    if os.environ.get("MAX_JOBS"):
        if not re.fullmatch(r"0*[1-9]\d*", os.environ["MAX_JOBS"].strip()):
            raise stop("MAX_JOBS", "a number of compiler processes, 1 or more")
        return int(os.environ["MAX_JOBS"])
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if available:
            jobs = min(jobs, int(available[1]) // 2**21)
    return max(1, jobs)


class Cuda(NamedTuple):
    """The CUDA toolkit to build with."""

    nvcc: str
    include: Path
    libraries: Path
    architectures: tuple[int, ...]
    oldest: int  # of all GPUs that the library runs on

    @property
    def flags(self) -> str:
        """PTX of the oldest architecture, for all others, and machine code for each, made from that PTX.

        PTX for each of them would take the compiler's first half as often, and a third more time in all; nothing in the
        kernels asks for more than the oldest has.
        """
        ptx = f"compute_{self.oldest}"
        codes = ",".join([ptx, *(f"sm_{a}" for a in self.architectures)])
        return f"-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -gencode=arch={ptx},code=[{codes}]"

    @property
    def names(self) -> str:
        return ",".join(f"sm_{a}" for a in self.architectures) + f",compute_{self.oldest}"


def find_cuda(torch: Path) -> Cuda | str:
    """The toolkit that is there, or why the CUDA kernels are not built.

    Its version need not be that of PyTorch's CUDA: the runtime is linked in, and before it runs the library looks whether the
    driver is new enough. Without CUDA in PyTorch the kernels are built where their architectures are named, as for a wheel.
    """
    if flag("PROAC_NO_CUDA"):
        return "PROAC_NO_CUDA=1"
    has_cuda = re.search(r"^cuda[^=]*= '\d+", (torch / "version.py").read_text(), re.MULTILINE)
    if not (has_cuda or os.environ.get("PROAC_CUDA_ARCHITECTURES")):
        return "this PyTorch was built without CUDA"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    candidates = [f"{home}/bin/nvcc"] if "CUDA_HOME" in os.environ else ["nvcc", f"{home}/bin/nvcc"]
    nvcc = next((path for path in map(shutil.which, candidates) if path), None)
    if nvcc is None:
        return "no nvcc found (on the path, or below CUDA_HOME)"
    # nvcc may be a wrapper: it says itself where its toolkit is
    said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(.+)", said)
    root = Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parent.parent
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    major = re.search(r"release (\d+)\.", version)
    folders = [root / "include", torch.parent / "nvidia" / f"cu{major[1] if major else '?'}" / "include"]
    include = next((folder for folder in folders if (folder / "cuda_runtime_api.h").is_file()), None)
    if include is None:
        return f"no cuda_runtime_api.h in {' or '.join(map(str, folders))}"
    libraries = next((root / name for name in ("lib64", "lib") if (root / name / "libcudart_static.a").is_file()), root)
    if not (libraries / "libcudart_static.a").is_file():
        return f"no libcudart_static.a below {root}"
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = tuple(int(a) for a in re.findall(r"compute_(\d+)", listed))
    return Cuda(nvcc, include, libraries, *architectures_asked_for(known))


def cuda_sources() -> list[str]:
    """The CUDA sources, where they can be built."""
    cuda = find_cuda(find_torch())
    if isinstance(cuda, str):
        loudly(
            f'building WITHOUT CUDA kernels: {cuda}.\nbackend="cuda" will not run; CUDA tensors take "triton" or "reference".'
        )
        return []
    return ["csrc/cuda/ops.cpp", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.cu"))]


class NinjaBuild(build_ext):
    """Compiles each source with its own flags (setuptools knows only one set for all) and links them, by ninja."""

    def build_extension(self, ext: Extension) -> None:
        torch, ninja = find_torch(), find_ninja()
        check_version(torch)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(self.ninja_file(ext, torch, target))
        jobs = max_jobs()
        print(f"proac_cuda: compiling against {torch} with {jobs} jobs", flush=True)
        subprocess.run([*ninja, "-C", str(work), "-j", str(jobs), "-v"], check=True)

    def copy_file(self, infile: str, outfile: str, *args: Any, **options: Any) -> Any:
        """As setuptools', but under another name first: whoever stops it leaves no half of a library to be loaded."""
        target = Path(outfile) / Path(infile).name if Path(outfile).is_dir() else Path(outfile)
        part = target.with_name(target.name + ".part")
        super().copy_file(infile, str(part), *args, **options)
        os.replace(part, target)
        return str(target), True

    def ninja_file(self, ext: Extension, torch: Path, target: Path) -> str:
        """The build: one compile edge for each source, one link edge."""
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        sanitizers = "-fsanitize=address,undefined -fno-omit-frame-pointer -g1 -O1"
        sanitize = sanitizers if flag("PROAC_SANITIZE") else ""
        flags = [
            "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra",
            "-Wno-maybe-uninitialized -Wno-uninitialized -Wno-psabi",  # the first two are the fault of GCC's intrinsics
            "-Wno-unknown-warning-option",  # Clang knows not all of them
            "-DTORCH_TARGET_VERSION=0x020a000000000000ULL -DTORCH_STABLE_ONLY",
            f"-isystem {_escape(torch / 'include')} -isystem {_escape(torch / 'include/torch/csrc/api/include')}",
            "-DPROAC_X86_KERNELS" if x86 else "",
            sanitize,
            os.environ.get("CXXFLAGS", ""),
        ]
        # libtorch brings libtorch_cuda with it where PyTorch has one; so the same library loads where it has none
        no_drop = "-Wl,--no-as-needed " if sys.platform == "linux" else ""
        libraries = f"{no_drop}-L{_escape(torch / 'lib')} -ltorch -ltorch_cpu -lc10"
        cuda = find_cuda(torch) if any(source.endswith(".cu") for source in ext.sources) else None
        if isinstance(cuda, Cuda):
            flags.append(f"-isystem {_escape(cuda.include)} -DUSE_CUDA -DPROAC_CUDA_ARCHITECTURES='\"{cuda.names}\"'")
            libraries += f" -L{_escape(cuda.libraries)} -lcudart_static -lrt -lpthread -ldl"
        mac = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
        lines = [
            f"cxx = {compiler()}",
            f"cflags = {' '.join(filter(None, flags))}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $cflags $isa -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule compile_cuda",
            f"  command = {cuda.nvcc} -MD -MF $out.d {cuda.flags} -c $in -o $out"
            if isinstance(cuda, Cuda)
            else "  command = false",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx -shared {mac} {sanitize} $in -o $out.part {libraries} && mv $out.part $out",
        ]
        objects = []
        for source in ext.sources:
            if source in ISA_FLAGS and not x86 and ISA_FLAGS[source]:
                continue
            objects.append(source.replace("/", "_") + ".o")
            rule = "compile_cuda" if source.endswith(".cu") else "compile"
            lines += [
                f"build {objects[-1]}: {rule} {_escape(ROOT.resolve() / source)}",
                f"  isa = {' '.join(ISA_FLAGS.get(source, []))}",
            ]
        lines += [f"build {_escape(target)}: link {' '.join(objects)}", f"default {_escape(target)}", ""]
        return "\n".join(lines)


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def extensions() -> list[Extension]:
    """The library, or nothing where it cannot or shall not be built."""
    why_not = None
    if flag("PROAC_NO_EXT"):
        why_not = "PROAC_NO_EXT=1"
    elif sys.platform == "win32":
        why_not = "the kernels need GCC or Clang, which this build does not look for on Windows"
    elif compiler() is None:
        why_not = "no C++ compiler found (CXX, g++, clang++)"
    if why_not:
        loudly(
            f"installing WITHOUT compiled kernels: {why_not}.\n"
            'Only backend="reference" will run on CPU tensors, and it is many times slower.'
        )
        return []
    sources = CPU_SOURCES + list(ISA_FLAGS) + cuda_sources()
    return [Extension("proac_cuda._C", sources=sources, py_limited_api=True)]


if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"proac_cuda: the build needs setuptools >= {OLDEST_SETUPTOOLS}, but {setuptools.__version__} is installed. Run\n"
        f'    pip install "setuptools>={OLDEST_SETUPTOOLS}" wheel ninja\n'
        "and build again."
    )
modules = extensions()
setup(
    ext_modules=modules,
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
)
