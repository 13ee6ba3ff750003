"""Stage (i), its second kernel: what the chunks of pixels left, as one set of statistics."""

from __future__ import annotations

import triton.language as tl

from .forward import EXP_SUM, HARDEST_NEGATIVE, MAXIMUM, NUM_PARTIALS, first_of
from .pixels import kernel


@kernel
def merge_statistics_kernel(
    partials, diagnostics, statistics, merged_diagnostics, counters, chunks,
    K: tl.constexpr, KB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """:func:`proac_cuda.stages.merge_statistics` over the chunks, in their order; and stage (ii)'s counters set to 0."""
    REAL: tl.constexpr = partials.dtype.element_ty
    k = tl.program_id(0) * KB + tl.arange(0, KB)
    maximum = tl.full((KB,), float("-inf"), REAL)
    hardest = tl.full((KB,), float("-inf"), REAL)
    exp_sum = tl.full((KB,), 0.0, REAL)
    for c0 in range(0, chunks, CB):
        c = c0 + tl.arange(0, CB)
        mask = (c < chunks)[:, None] & (k < K)[None, :]
        row = partials + c[:, None] * (NUM_PARTIALS * K) + k[None, :]
        part = tl.load(row + MAXIMUM * K, mask=mask, other=float("-inf"))
        part_sum = tl.load(row + EXP_SUM * K, mask=mask, other=0.0)
        higher = tl.maximum(maximum, tl.max(part, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        exp_sum = exp_sum * tl.exp(maximum - shift) + tl.sum(part_sum * tl.exp(part - shift[None, :]), 0)
        maximum = higher
        part = tl.load(row + HARDEST_NEGATIVE * K, mask=mask, other=float("-inf"))
        hardest = tl.maximum(hardest, tl.max(part, 0))
    tl.store(statistics + k, tl.where(exp_sum == 0, float("-inf"), maximum + tl.log(exp_sum)), mask=k < K)
    hardest = tl.where(exp_sum == exp_sum, hardest, float("nan"))  # a maximum passes over NaN, the sum did not
    tl.store(statistics + HARDEST_NEGATIVE * K + k, hardest, mask=k < K)
    for statistic in range(1, 5):
        total = tl.full((KB,), 0.0, REAL)
        for c0 in range(0, chunks, CB):
            c = c0 + tl.arange(0, CB)
            mask = (c < chunks)[:, None] & (k < K)[None, :]
            row = partials + c[:, None] * (NUM_PARTIALS * K) + k[None, :]
            total += tl.sum(tl.load(row + statistic * K, mask=mask, other=0.0), 0)
        tl.store(statistics + statistic * K + k, total, mask=k < K)

    tl.store(counters + 1 + tl.program_id(0), 0)
    if tl.program_id(0) == 0:
        tl.store(counters, 0)
        for kind in range(2):
            count, value = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
            for c0 in range(0, chunks, CB):
                c = c0 + tl.arange(0, CB)
                counts = tl.load(diagnostics + c * 4 + 2 * kind, mask=c < chunks, other=0)
                values = tl.load(diagnostics + c * 4 + 2 * kind + 1, mask=c < chunks, other=0)
                first, _ = first_of(values, counts > 0)
                value = tl.where(count == 0, first, value)
                count += tl.sum(counts, 0)
            tl.store(merged_diagnostics + 2 * kind, count)
            tl.store(merged_diagnostics + 2 * kind + 1, value)
