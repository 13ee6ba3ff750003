"""How the CUDA kernels' fast path cuts calls into tiles, on each kind of GPU.

    python tests/cuda_plans.py [D ...]

asks the launchers themselves, built for the CPU; ``TILES`` is what they are expected to say.
``features``: bytes of features on their way to a multiprocessor, at most;
``prototypes``: bytes of prototypes read over the features' bytes, for tiles that are whole.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.nvcc_facts import MACHINES  # noqa: E402

STAGES = ("forward", "backward", "backward, learnable")

# Pixels of a tile and blocks on a multiprocessor at D = 256, forward and backward, by compute capability (80: 163 KB of shared
# memory, 90: 227 KB, 120: 99 KB), dtype and K. All of a pixel's channels lie in its block's tile.
TILES = {
    (80, "bfloat16", 19): ((128, 2), (64, 2)),  # backward keeps the prototypes too: 128 pixels would leave them no room
    (80, "bfloat16", 64): ((256, 1), (256, 1)),  # two tiles of 128 leave no room for two stages of prototypes
    (80, "bfloat16", 150): ((256, 1), (256, 1)),
    (80, "bfloat16", 256): ((128, 1), (128, 1)),  # S of 16 pixels fills the registers
    (80, "float32", 19): ((64, 2), (64, 2)),
    (80, "float32", 64): ((64, 2), (64, 2)),
    (80, "float32", 150): ((128, 1), (128, 1)),
    (80, "float32", 256): ((64, 1), (128, 1)),  # forward's sums of 256 classes for 8 warps take 32 KB more
    (90, "bfloat16", 19): ((128, 2), (128, 2)),
    (90, "bfloat16", 64): ((128, 2), (128, 2)),
    (90, "bfloat16", 150): ((256, 1), (256, 1)),
    (90, "bfloat16", 256): ((128, 1), (128, 1)),
    (90, "float32", 19): ((64, 2), (64, 2)),
    (90, "float32", 64): ((64, 2), (64, 2)),
    (90, "float32", 150): ((128, 1), (128, 1)),
    (90, "float32", 256): ((128, 1), (128, 1)),
    (120, "bfloat16", 19): ((64, 2), (64, 2)),
    (120, "bfloat16", 64): ((128, 1), (128, 1)),
    (120, "bfloat16", 150): ((128, 1), (128, 1)),
    (120, "bfloat16", 256): ((64, 1), (64, 1)),
    (120, "float32", 19): ((32, 2), (32, 2)),
    (120, "float32", 64): ((32, 2), (32, 2)),
    (120, "float32", 150): ((64, 1), (64, 1)),
    (120, "float32", 256): ((64, 1), (64, 1)),
}


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
