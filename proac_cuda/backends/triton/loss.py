"""Stage (ii) and the reduction, equations (4), (6), (7): what the positives leave of each class, and the loss out of it.

Each chunk of pixels leaves two numbers per class. The last program to have done so for a block of classes adds the chunks up,
in their order whichever program it is; where the loss is asked for too, the last of those makes it. So one launch does
what takes three where ranks exchange their sums in between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import NEGATIVE_WEIGHT, PIXEL_LOSS_SUM, WEIGHT
from .pixels import kernel, read_pixels, tile_of_pixels, tiles_of_chunk
from .vectors import quotient

NONE = tl.constexpr(0)  # as in stages.py
MEAN = tl.constexpr(1)
REDUCED = tl.constexpr(256)  # classes at a time where a program sums over all: the same sums wherever they are made


@triton.jit
def log1p_exp(value):
    """softplus, log(1 + e^value), with full relative accuracy at both ends.

    max(value, 0) + log(1 + e), e = exp(-|value|), by log(1 + e) = 2 atanh(r), r = e / (2 + e) <= 1/3, as a power series.
    """
    TERMS: tl.constexpr = 18 if value.dtype == tl.float64 else 9
    e = tl.exp(-tl.abs(value))
    r = e / (2.0 + e)
    series = tl.zeros_like(r)
    for term in tl.static_range(TERMS):
        series = series * (r * r) + 1.0 / (2 * (TERMS - term) - 1)
    return tl.where(value != value, value, tl.maximum(value, 0.0) + 2.0 * r * series)


@triton.jit
def contrast_log_z(statistics, k, mask, NEGATIVE_MEAN: tl.constexpr, K: tl.constexpr):
    """The log Z_k of (4) and (7): that of (3), minus log sum_{N_k} w_j for the mean over negatives."""
    log_z = tl.load(statistics + k, mask=mask, other=0.0)
    if NEGATIVE_MEAN:
        weight = tl.load(statistics + NEGATIVE_WEIGHT * K + k, mask=mask, other=0.0)
        log_z = tl.where(weight > 0, log_z - tl.log(weight), log_z)
    return log_z


@triton.jit
def over(numerator, denominator):
    """numerator / denominator, 0 where the denominator is 0."""
    one = tl.full(denominator.shape, 1.0, denominator.dtype)
    return tl.where(denominator == 0, 0.0, quotient(numerator, tl.where(denominator == 0, one, denominator)))


@triton.jit
def total_weights(statistics, class_weight, K: tl.constexpr, KB: tl.constexpr):
    """Sum of c_k over the classes that are present, and sum_V w."""
    REAL: tl.constexpr = statistics.dtype.element_ty
    classes = tl.full((KB,), 0.0, REAL)
    pixels = tl.full((KB,), 0.0, REAL)
    for k0 in range(0, K, KB):
        k = k0 + tl.arange(0, KB)
        weight = tl.load(statistics + WEIGHT * K + k, mask=k < K, other=0.0)
        c = tl.full((KB,), 0.0, REAL) + 1.0
        if class_weight is not None:
            c = tl.load(class_weight + k, mask=k < K, other=0.0)
        classes += tl.where(weight > 0, c, 0.0)
        pixels += weight
    return tl.sum(classes, 0), tl.sum(pixels, 0)


@triton.jit
def arrives_last(counter, programs):
    """Whether this program is the last of ``programs`` to come here. It then sees what all of them stored before.

    ``counter`` is 0 before the launch. A program that is not the last does not wait.
    """
    tl.debug_barrier()  # the stores of all threads come before the addition, which one of them makes
    return tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1


@kernel
def positive_sums_kernel(
    positive, labels, weights, statistics, class_weight, partials, counters, sums, loss,
    tiling, sampling, alpha: "fp64",
    NEGATIVE_MEAN: tl.constexpr, PIXEL_ANCHOR: tl.constexpr, REDUCTION: tl.constexpr,
    K: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, CB: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Stage (ii): sums over P_k of w softplus(log Z_k - S_ki) and of w sigmoid(log Z_k - S_ki); unless None, the loss."""
    REAL: tl.constexpr = partials.dtype.element_ty
    chunk, block = tl.program_id(0), tl.program_id(1)
    chunks, blocks = tl.num_programs(0), tl.num_programs(1)
    k = block * KB + tl.arange(0, KB)
    softplus_sum = tl.full((KB,), 0.0, REAL)
    sigmoid_sum = tl.full((KB,), 0.0, REAL)
    first_tile, end = tiles_of_chunk(chunk, tiling)
    for tile in range(first_tile, end):
        _, _, index, inside = tile_of_pixels(tile, tiling, BM, INDEX)
        label, weight, _, _, _, _ = read_pixels(index, inside, labels, weights, sampling, K, REAL)
        kept = label >= 0
        s = tl.load(positive + index, mask=inside, other=0.0)
        margin = contrast_log_z(statistics, label, kept, NEGATIVE_MEAN, K) - s
        own = label[None, :] == k[:, None]
        softplus = weight * log1p_exp(margin)
        sigmoid = weight / (1.0 + tl.exp(-margin))
        softplus_sum += tl.sum(tl.where(own, softplus[None, :], 0.0), 1)
        sigmoid_sum += tl.sum(tl.where(own, sigmoid[None, :], 0.0), 1)
    tl.store(partials + chunk * K + k, softplus_sum, mask=k < K)
    tl.store(partials + (chunks + chunk) * K + k, sigmoid_sum, mask=k < K)

    if arrives_last(counters + 1 + block, chunks):
        add_chunks(partials, sums, chunks, k, K, CB)
        if loss is not None:  # known at compile time
            last_of_all = arrives_last(counters, blocks)
            if last_of_all:
                reduce_loss(statistics, sums, class_weight, loss, alpha, PIXEL_ANCHOR, REDUCTION, K, REDUCED)


@triton.jit
def add_chunks(partials, sums, chunks, k, K: tl.constexpr, CB: tl.constexpr):
    """:func:`proac_cuda.stages.merge_positive_sums` over the chunks, in their order: (2, chunks, K) to (2, K)."""
    for row in range(2):
        total = tl.full(k.shape, 0.0, partials.dtype.element_ty)
        for c0 in range(0, chunks, CB):
            c = c0 + tl.arange(0, CB)
            mask = (c < chunks)[:, None] & (k < K)[None, :]
            part = partials + (row * chunks + c)[:, None] * K + k[None, :]
            total += tl.sum(tl.load(part, mask=mask, other=0.0, cache_modifier=".cg"), 0)
        tl.store(sums + row * K + k, total, mask=k < K)


@triton.jit
def reduce_loss(
    statistics, sums, class_weight, loss, alpha, PIXEL_ANCHOR: tl.constexpr, REDUCTION: tl.constexpr,
    K: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """(4) and (6): the loss, one number or K of them."""
    REAL: tl.constexpr = statistics.dtype.element_ty
    losses = tl.full((KB,), 0.0, REAL)
    pixel_losses = tl.full((KB,), 0.0, REAL)
    for k0 in range(0, K, KB):
        k = k0 + tl.arange(0, KB)
        weight = tl.load(statistics + WEIGHT * K + k, mask=k < K, other=0.0)
        class_loss = over(tl.load(sums + k, mask=k < K, other=0.0, cache_modifier=".cg"), weight)
        if class_weight is not None:
            class_loss *= tl.load(class_weight + k, mask=k < K, other=0.0)
        if REDUCTION == NONE:
            tl.store(loss + k, class_loss, mask=k < K)
        losses += class_loss
        if PIXEL_ANCHOR:
            pixel_losses += tl.load(statistics + PIXEL_LOSS_SUM * K + k, mask=k < K, other=0.0)
    if REDUCTION != NONE:
        classes, pixels = total_weights(statistics, class_weight, K, KB)
        total = tl.sum(losses, 0)
        if REDUCTION == MEAN:
            total = over(total, classes)
        if PIXEL_ANCHOR:
            total += tl.full((), alpha, REAL) * over(tl.sum(pixel_losses, 0), pixels)
        tl.store(loss, total)


@kernel
def reduce_loss_kernel(
    statistics, sums, class_weight, loss, alpha: "fp64", PIXEL_ANCHOR: tl.constexpr, REDUCTION: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """The loss alone, of sums that were merged over ranks or chunks. One program."""
    reduce_loss(statistics, sums, class_weight, loss, alpha, PIXEL_ANCHOR, REDUCTION, K, REDUCED)
