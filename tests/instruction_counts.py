"""Warp instructions, tensor-core products and shared-memory wavefronts of the CUDA kernels for 16 pixels.

    python tests/instruction_counts.py

counts, in the PTX interpreter, each instruction once for every warp that issues it, whatever the number of its threads that
are active: PTX for sm_80, D = 256, whole tiles, labels in runs of 16 as those of an image.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

PIXELS = 512


class Count(NamedTuple):
    """Of one kernel, for 16 pixels."""

    instructions: float
    products: float  #: mma.sync
    wavefronts: float  #: of shared memory
    ideal_wavefronts: float  #: without bank conflicts


def counts(dtype: torch.dtype, num_classes: int, pixels: int = PIXELS) -> dict[str, Count]:
    """Of the kernel that reads the features, forward and backward."""
    from ptx_call import Call
    from stage_comparison import make_case

    case = make_case(dtype, 256, num_classes, spatial=(16, pixels // 16), batch=1)
    case["labels"][:] = torch.arange(pixels // 16 * 16).view(16, -1) // 16 * 7 % num_classes
    found = {}
    for name, count, _ in Call(case, hardest=False).replay.counters:
        if "fast_" in name:
            stage = "forward" if "statistics" in name else "backward"
            wavefronts = count.shared_read_wavefronts + count.shared_write_wavefronts
            ideal = count.shared_read_ideal + count.shared_write_ideal
            totals = (count.warp_instructions, count.mma, wavefronts, ideal)
            found[stage] = Count(*(total / (pixels / 16) for total in totals))
    return found


def main() -> None:
    """Print the table."""
    print("| dtype | K | pass | instructions | products | wavefronts | of ideal |\n|---|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        for num_classes in (19, 150):
            for stage, count in counts(dtype, num_classes).items():
                print(
                    f"| {str(dtype).removeprefix('torch.')} | {num_classes} | {stage} | {count.instructions:,.0f} "
                    f"| {count.products:.0f} | {count.wavefronts:.0f} | {count.wavefronts / count.ideal_wavefronts:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
