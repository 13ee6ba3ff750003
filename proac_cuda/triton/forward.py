"""Stage (i), equations (1), (3), (5): every statistic of the classes out of one pass over the features.

A program takes BLOCKS blocks of KB classes and a run of pixel tiles, one chunk of at most MAX_CHUNKS. For a tile of BM pixels
it reads the features x once, block by block of channels, and has S = <phat, x> / (|x| tau) as BLOCKS matrices (KB, BM) which
never leave the registers; what follows goes block by block. Labels are read first, while those registers are free.
Each class's log-sum-exp runs on a running maximum m, right for every temperature and weight:

    t_ki = S_ki + log w_i      m' = max(m, max_i t_ki)      z' = z exp(m - m') + sum_i exp(t_ki - m')

A chunk leaves NUM_PARTIALS numbers per class, which grow in memory from tile to tile: registers are for S. A second kernel
merges the chunks in their order. No sum depends on timing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pixels import kernel, members, read_pixels, tile_of_pixels
from .vectors import add_products, add_squares, load_features, load_parts, norm_and_inverse, opaque

# Rows of the partial sums of a chunk: those of stages.py, but the log-sum-exp as maximum and sum.
MAXIMUM = tl.constexpr(0)
WEIGHT = tl.constexpr(1)
NEGATIVE_WEIGHT = tl.constexpr(2)
POSITIVE_SUM = tl.constexpr(3)
PIXEL_LOSS_SUM = tl.constexpr(4)
HARDEST_NEGATIVE = tl.constexpr(5)
EXP_SUM = tl.constexpr(6)
NUM_PARTIALS = tl.constexpr(7)


@triton.jit
def times(value, COUNT: tl.constexpr):
    """A tuple of COUNT times ``value``."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (value,)
    return values


@triton.jit
def add_products_of_blocks(
    totals, anchors, x, k, d, K_PAD: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tuple of <phat_k, x>, one (KB, BM) for each block of classes, of which k (KB,) is the first, and what the channels d
    of x (BD, BM) add to it."""
    grown = ()
    for block in tl.static_range(len(totals)):
        classes = k + block * k.shape[0]
        parts = load_parts(anchors, classes, d, K_PAD, D_PAD)
        grown = grown + (add_products(totals[block], parts, x, PRECISION, INTERPRETED),)
    return grown


@triton.jit
def similarities_of_blocks(
    features, anchors, image, pixel, inside, k, strides, inverse_temperature,
    D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, BLOCKS: tl.constexpr, BD: tl.constexpr,
    REAL: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """(1): S of a tile, its features read once, as a tuple of blocks (KB, BM) of classes, of which k (KB,) is the first; and
    1/|x|."""
    totals = times(tl.full((k.shape[0], pixel.shape[0]), 0.0, REAL), BLOCKS)
    squares = tl.full((BD, pixel.shape[0]), 0.0, REAL)
    far_squares = squares
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        x = load_features(features, image, pixel, inside, d, strides, D)
        totals = add_products_of_blocks(totals, anchors, x, k, d, K_PAD, D_PAD, PRECISION, INTERPRETED)
        squares, far_squares = add_squares(squares, far_squares, x.to(REAL))
    _, inverse = norm_and_inverse(tl.sum(squares, 0), tl.sum(far_squares, 0))
    s = ()
    for block in tl.static_range(BLOCKS):
        s = s + (totals[block] * (inverse * inverse_temperature)[None, :],)
    return s, inverse


@triton.jit
def add_to_log_sum(maximum, exp_sum, terms, AXIS: tl.constexpr):
    """One more block of terms in a log-sum-exp along AXIS, held as (maximum, sum of exponentials under it)."""
    higher = tl.maximum(maximum, tl.max(terms, AXIS))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    exp_sum = exp_sum * tl.exp(maximum - shift) + tl.sum(tl.exp(terms - tl.expand_dims(shift, AXIS)), AXIS)
    return higher, exp_sum


@triton.jit
def _add_two(a, b, more_a, more_b):
    return a + more_a, b + more_b


@triton.jit
def _add_three(a, b, c, more_a, more_b, more_c):
    return a + more_a, b + more_b, c + more_c


@triton.jit
def sums_over_pixels(values, INTERPRETED: tl.constexpr):
    """Sums along axis 1 of a tuple of two or three matrices (KB, BM), as one reduction.

    Else Triton lays those that do not come out of a product over the threads in a way of its own, which takes many more
    shuffles, and makes the labels and masks once more for it.
    """
    if INTERPRETED:  # which takes its time for any reduction but plain ones
        sums = ()
        for number in tl.static_range(len(values)):
            sums = sums + (tl.sum(values[number], 1),)
        return sums
    elif len(values) == 2:
        return tl.reduce((values[0], values[1]), 1, _add_two)
    else:
        return tl.reduce((values[0], values[1], values[2]), 1, _add_three)


@triton.jit
def add_in_place(pointers, values, mask):
    """Add ``values`` to what stands in memory."""
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + values, mask=mask)


@triton.jit
def log_sum_of_blocks(s, K: tl.constexpr, KB: tl.constexpr):
    """(5): logsumexp_c S_ci of a tile's pixels, (BM,), from the blocks of all classes."""
    top = tl.full((s[0].shape[1],), float("-inf"), s[0].dtype)
    total = tl.full((s[0].shape[1],), 0.0, s[0].dtype)
    for block in tl.static_range(len(s)):
        k = block * KB + tl.arange(0, KB)
        top, total = add_to_log_sum(top, total, tl.where((k < K)[:, None], s[block], float("-inf")), 0)
    return top + tl.log(total)


@kernel
def class_statistics_kernel(
    features, anchors, labels, weights, thresholds, rng_state, log_normaliser,
    partials, positive, diagnostics,
    inverse_temperature: "fp64", ignore_index, P, tiles_per_image, tiles, tiles_per_chunk,
    strides, size, label_size, scale, label_strides, weight_strides,
    K: tl.constexpr, D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr,
    PIXEL_ANCHOR: tl.constexpr, HARDEST: tl.constexpr,
    BLOCKS: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, INTERPRETED: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """Partial sums of a chunk (program axis 0) for BLOCKS blocks of KB classes (axis 1), and S_{y_i,i} of its pixels."""
    REAL: tl.constexpr = partials.dtype.element_ty
    chunk, first = tl.program_id(0), tl.program_id(1) * BLOCKS * KB
    # All weights 1, and all pixels of other classes taken: these are counted, and a difference of counts is exact.
    COUNTED: tl.constexpr = weights is None and thresholds is None
    tau_inverse = tl.full((), inverse_temperature, REAL)
    zero, one = tl.full((), 0.0, REAL), tl.full((), 1.0, REAL)
    rows = partials + chunk * (NUM_PARTIALS * K)  # of this chunk
    for block in tl.static_range(BLOCKS):
        k = first + block * KB + tl.arange(0, KB)
        row = rows + k
        nothing = tl.full((KB,), 0.0, REAL)
        tl.store(row + MAXIMUM * K, nothing + float("-inf"), mask=k < K)
        tl.store(row + HARDEST_NEGATIVE * K, nothing + float("-inf"), mask=k < K)
        for statistic in tl.static_range(WEIGHT, HARDEST_NEGATIVE):
            tl.store(row + statistic * K, nothing, mask=k < K)
        tl.store(row + EXP_SUM * K, nothing, mask=k < K)
    if first == 0:
        for number in tl.static_range(4):
            tl.store(diagnostics + chunk * 4 + number, tl.full((), 0, tl.int64))
    tl.debug_barrier()
    total_weight = zero

    for tile in range(chunk * tiles_per_chunk, tl.minimum((chunk + 1) * tiles_per_chunk, tiles)):
        image, pixel, index, inside = tile_of_pixels(tile, tiles_per_image, P, BM, INDEX)
        label, weight, bad_label, bad_weight, raw_label, raw_weight = read_pixels(
            index, inside, labels, label_strides, weights, weight_strides, size, label_size, scale, ignore_index, K,
            REAL,
        )  # fmt: skip
        if (first == 0) & (tl.max((bad_label | bad_weight).to(tl.int32), 0) > 0):
            note_bad(diagnostics + chunk * 4, raw_label, bad_label)
            note_bad(diagnostics + chunk * 4 + 2, raw_weight.to(tl.float64).to(tl.int64, bitcast=True), bad_weight)

        # Opaque: else the compiler keeps the addresses of all blocks in registers from tile to tile.
        classes = first + opaque(tl.arange(0, KB), REGISTERS)
        s, _ = similarities_of_blocks(
            features, anchors, image, pixel, inside, classes, strides, tau_inverse,
            D, K_PAD, D_PAD, BLOCKS, BD, REAL, PRECISION, INTERPRETED,
        )  # fmt: skip
        normaliser = weight
        if PIXEL_ANCHOR:
            if log_normaliser is None:
                normaliser = log_sum_of_blocks(s, K, KB)
            else:
                normaliser = tl.load(log_normaliser + index, mask=inside, other=0.0)
        own_s = tl.full((KB, BM), 0.0, REAL)
        for block in tl.static_range(BLOCKS):
            k = first + block * KB + tl.arange(0, KB)
            own_s = tl.where(label[None, :] == k[:, None], s[block], own_s)
        lowest = tl.where(first == 0, -1, first)  # pixels outside V, label -1, are left to the first program
        ours = (label >= lowest) & (label < first + BLOCKS * KB)
        tl.store(positive + index, tl.sum(own_s, 0), mask=inside & ours)

        total_weight += tl.sum(weight, 0)
        factor, log_weight = one, one  # without weights: a number, which takes no register
        if weights is not None:
            factor, log_weight = weight[None, :], tl.log(weight)[None, :]
        for block in tl.static_range(BLOCKS):
            k = classes + block * KB
            row = rows + k
            own, negative = members(label, k, index, thresholds, rng_state, K)
            terms = s[block]
            if weights is not None:
                terms += log_weight
            terms = tl.where(negative, terms, float("-inf"))
            maximum, exp_sum = add_to_log_sum(
                tl.load(row + MAXIMUM * K, mask=k < K, other=0.0),
                tl.load(row + EXP_SUM * K, mask=k < K, other=0.0), terms, 1,
            )  # fmt: skip
            summands = (tl.where(own, factor, zero), tl.where(own, factor * s[block], 0.0))
            if not COUNTED:
                summands = summands + (tl.where(negative, factor, zero),)
            sums = sums_over_pixels(summands, INTERPRETED)
            weight_sum = tl.load(row + WEIGHT * K, mask=k < K, other=0.0) + sums[0]
            positive_sum = tl.load(row + POSITIVE_SUM * K, mask=k < K, other=0.0) + sums[1]
            negative_weight, hardest, pixel_loss_sum = total_weight - weight_sum, weight_sum, weight_sum
            if not COUNTED:
                negative_weight = tl.load(row + NEGATIVE_WEIGHT * K, mask=k < K, other=0.0) + sums[2]
            if HARDEST:
                hardest = tl.load(row + HARDEST_NEGATIVE * K, mask=k < K, other=0.0)
                hardest = tl.maximum(hardest, tl.max(tl.where(negative, s[block], float("-inf")), 1))
            if PIXEL_ANCHOR:
                excess = tl.where(own, factor * (normaliser[None, :] - s[block]), 0.0)
                pixel_loss_sum = tl.load(row + PIXEL_LOSS_SUM * K, mask=k < K, other=0.0) + tl.sum(excess, 1)
            tl.debug_barrier()  # several threads have read what one overwrites
            tl.store(row + MAXIMUM * K, maximum, mask=k < K)
            tl.store(row + EXP_SUM * K, exp_sum, mask=k < K)
            tl.store(row + WEIGHT * K, weight_sum, mask=k < K)
            tl.store(row + POSITIVE_SUM * K, positive_sum, mask=k < K)
            tl.store(row + NEGATIVE_WEIGHT * K, negative_weight, mask=k < K)
            if HARDEST:
                tl.store(row + HARDEST_NEGATIVE * K, hardest, mask=k < K)
            if PIXEL_ANCHOR:
                tl.store(row + PIXEL_LOSS_SUM * K, pixel_loss_sum, mask=k < K)
        tl.debug_barrier()  # the next tile reads what this one wrote


@triton.jit
def first_of(values, chosen):
    """The first of the chosen int64 values of a tile, 0 where there is none, and how many are chosen."""
    order = tl.arange(0, values.shape[0])
    first = tl.min(tl.where(chosen, order, values.shape[0]), 0)
    return tl.sum(tl.where(chosen & (order == first), values, 0), 0), tl.sum(chosen.to(tl.int32), 0)


@triton.jit
def note_bad(found, values, bad):
    """Add a tile's bad values to a count in memory, beside which the first of them stands."""
    value, here = first_of(values, bad)
    count, known = tl.load(found), tl.load(found + 1)
    tl.debug_barrier()
    tl.store(found, count + here)
    tl.store(found + 1, tl.where(count == 0, value, known))


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


@kernel
def log_normaliser_kernel(
    features, anchors, log_normaliser,
    inverse_temperature: "fp64", P, tiles_per_image, strides,
    K: tl.constexpr, D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr,
    KB: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, INTERPRETED: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """(5): logsumexp_c S_ci of each pixel, for the twin where the classes do not fit into one block."""
    REAL: tl.constexpr = log_normaliser.dtype.element_ty
    image, pixel, index, inside = tile_of_pixels(tl.program_id(0), tiles_per_image, P, BM, INDEX)
    top = tl.full((BM,), float("-inf"), REAL)
    total = tl.full((BM,), 0.0, REAL)
    for k0 in range(0, K, KB):
        k = k0 + tl.arange(0, KB)
        s, _ = similarities_of_blocks(
            features, anchors, image, pixel, inside, k, strides, tl.full((), inverse_temperature, REAL),
            D, K_PAD, D_PAD, 1, BD, REAL, PRECISION, INTERPRETED,
        )  # fmt: skip
        top, total = add_to_log_sum(top, total, tl.where((k < K)[:, None], s[0], float("-inf")), 0)
    tl.store(log_normaliser + index, top + tl.log(total), mask=inside)
