"""A Triton kernel for tests: what `label_position` says of given pixels."""

from __future__ import annotations

import triton
import triton.language as tl

from proac_cuda.backends.triton.pixels import label_position


@triton.jit
def positions(index, out, count, sampling, BM: tl.constexpr):
    place = tl.arange(0, BM)
    position = label_position(tl.load(index + place, mask=place < count, other=0), sampling)
    for axis in tl.static_range(len(position)):
        tl.store(out + axis * BM + place, position[axis])
