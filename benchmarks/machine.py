"""What a measurement was made on, and of which commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import proac_cuda
from proac_cuda.backends.extension import build_info

ROOT = Path(__file__).resolve().parent.parent
CPU_FLAGS = re.compile(r"avx|amx|fma|f16c|sse4|asimd|sve|neon")
ASSUMED_CACHE = 64 << 20  # where the system does not say


def describe(device: str, threads: int) -> dict[str, Any]:
    """The machine, its software and the commit, as plain values."""
    cpu = _cpuinfo()
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu_model": "-".join(cpu.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "cpu_flags": sorted(f for f in cpu.get("flags", cpu.get("Features", "")).split() if CPU_FLAGS.search(f)),
        "cores": os.cpu_count(),
        "threads": threads,
        "last_level_cache_bytes": last_level_cache("cpu"),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "proac_cuda": proac_cuda.__version__,
        "kernels": build_info(),
        "device": device,
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    return found


def commit() -> str:
    """The commit of the source tree, with "(changed)" where it holds other changes than results; "unknown" without git."""
    try:
        revision = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md", ":!docs")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{revision} (changed)" if changed else revision


def last_level_cache(device: str) -> int:
    """Bytes of the largest cache of the device, as the system tells it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [_read(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=ASSUMED_CACHE)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _cpuinfo() -> dict[str, str]:
    """/proc/cpuinfo's first processor."""
    lines = _read("/proc/cpuinfo").split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
