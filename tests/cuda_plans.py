"""How the CUDA kernels' fast path cuts calls into tiles, on each kind of GPU.

    python tests/cuda_plans.py [D ...]

asks the launchers themselves, built for the CPU. ``features``: bytes of features on their way to a multiprocessor, at most;
``prototypes``: bytes of prototypes read over the features' bytes, for tiles that are whole.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.nvcc_facts import MACHINES  # noqa: E402

STAGES = ("forward", "backward", "backward, learnable")


def plan(
    machine: int,
    dtype: str,
    channels: int,
    num_classes: int,
    stage: int,
    channels_last: bool = False,
    pixels: int = 65536,
) -> dict[str, float]:
    """The plan, with ``features`` and ``prototypes``; empty where the plain path runs."""
    from cuda_on_cpu.stages import module

    module.set_options(shared_limit=MACHINES[machine][3])
    found: dict[str, float] = dict(module.plan(dtype, channels, pixels, channels_last, num_classes, stage))
    module.set_options()
    if not found:
        return {}
    size = 4 if dtype == "float32" else 2
    stage_bytes = -(-channels // found["stages"]) * size * found["pixels"]
    ahead = min(4 if found["resident"] else max(found["slots"], 2), found["stages"])
    found["features"] = found["blocks"] * stage_bytes * ahead
    prototype_bytes = found["rows"] * channels * 4  # two parts of 16 bits, or one of 32
    tiles = pixels / found["pixels"]
    times = min(tiles, found["blocks"] * 132) if found["resident"] else tiles * (1 + (stage > 0))
    found["prototypes"] = times * prototype_bytes / (pixels * channels * size)
    return found


def main() -> None:
    """Print the table."""
    columns = ("pixels", "threads", "blocks", "slots", "resident", "shared", "features", "prototypes")
    print(f"| GPU | dtype | D | K | pass | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 5)}")
    for channels in map(int, sys.argv[1:] or ("256", "1024")):
        for machine in (80, 90, 120):
            for dtype in ("bfloat16", "float32"):
                for num_classes in (19, 64, 150, 256):
                    for stage, name in enumerate(STAGES[:2]):
                        row = plan(machine, dtype, channels, num_classes, stage)
                        values = " | ".join(
                            f"{row[c]:.2f}" if c == "prototypes" else f"{row[c]:.0f}" for c in columns if row
                        )
                        print(
                            f"| sm_{machine} | {dtype} | {channels} | {num_classes} | {name} | {values or 'plain path'} |"
                        )


if __name__ == "__main__":
    main()
