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

from .pixels import kernel, members, read_pixels, sampling_key, tile_of_pixels, tiles_of_chunk
from .vectors import add_products, add_squares, load_features, load_parts, no_products, norm_and_inverse, opaque

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
def add_products_of_blocks(totals, anchors, x, k, d, CASE: tl.constexpr):
    """A tuple of <phat_k, x>, one (KB, BM) for each block of classes, and what the channels d of x (BD, BM) add to it.

    Of the blocks k (KB,) is the first.
    """
    grown = ()
    for block in tl.static_range(len(totals)):
        parts = load_parts(anchors, k + block * CASE.KB, d, CASE)
        if CASE.PARTS == 2:
            # Tensor cores truncate: summed by them alone, all channels give too little for features near their prototypes.
            total = totals[block] + add_products(no_products(CASE.KB, CASE), parts, x, CASE)
        else:
            total = add_products(totals[block], parts, x, CASE)
        if CASE.TENSOR_CORES:  # on AMD, Triton cannot load ahead around a line of assembly
            total = opaque(total, CASE)  # else all products are kept until the last is made
        grown = grown + (total,)
    return grown


@triton.jit
def similarities_of_blocks(features, anchors, image, pixel, inside, k, inverse_temperature, CASE: tl.constexpr):
    """(1): S of a tile, its features read once, and 1/|x|. S is a tuple of blocks (KB, BM) of classes, k (KB,) the first."""
    totals = times(tl.full((CASE.KB, CASE.BM), 0.0, CASE.REAL), CASE.BLOCKS)
    squares = tl.full((CASE.BD, CASE.BM), 0.0, CASE.REAL)
    far_squares = squares
    for d0 in range(0, CASE.D, CASE.BD):
        d = d0 + tl.arange(0, CASE.BD)
        x = load_features(features, image, pixel, inside, d, CASE)
        totals = add_products_of_blocks(totals, anchors, x, k, d, CASE)
        squares, far_squares = add_squares(squares, far_squares, x.to(CASE.REAL))
    _, inverse = norm_and_inverse(tl.sum(squares, 0), tl.sum(far_squares, 0))
    s = ()
    for block in tl.static_range(len(totals)):
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
def log_sum_of_blocks(s, CASE: tl.constexpr):
    """(5): logsumexp_c S_ci of a tile's pixels, (BM,), from the blocks of all classes."""
    top = tl.full((CASE.BM,), float("-inf"), CASE.REAL)
    total = tl.full((CASE.BM,), 0.0, CASE.REAL)
    for block in tl.static_range(len(s)):
        k = block * CASE.KB + tl.arange(0, CASE.KB)
        top, total = add_to_log_sum(top, total, tl.where((k < CASE.K)[:, None], s[block], float("-inf")), 0)
    return top + tl.log(total)


@triton.jit
def begin_chunk(rows, found, first, CASE: tl.constexpr):
    """What a program's chunk holds before its first tile; ``found`` are the diagnostics."""
    nothing = tl.full((CASE.KB,), 0.0, CASE.REAL)
    for block in range(CASE.BLOCKS):
        k = first + block * CASE.KB + tl.arange(0, CASE.KB)
        for statistic in range(NUM_PARTIALS):
            maximum = (statistic == MAXIMUM) | (statistic == HARDEST_NEGATIVE)
            start = tl.where(maximum, nothing + float("-inf"), nothing)
            tl.store(rows + statistic * CASE.K + k, start, mask=k < CASE.K)
    if first == 0:
        for number in range(4):
            tl.store(found + number, tl.full((), 0, tl.int64))


@kernel
def class_statistics_kernel(
    features, anchors, labels, weights, sets, log_normaliser, partials, positive, diagnostics,
    tiling, sampling, inverse_temperature: "fp64", HARDEST: tl.constexpr, CASE: tl.constexpr,
):  # fmt: skip
    """Partial sums of a chunk (program axis 0) for BLOCKS blocks of KB classes (axis 1), and S_{y_i,i} of its pixels."""
    K: tl.constexpr = CASE.K
    KB: tl.constexpr = CASE.KB
    BLOCKS: tl.constexpr = CASE.BLOCKS
    REAL: tl.constexpr = CASE.REAL
    chunk, first = tl.program_id(0), tl.program_id(1) * BLOCKS * KB
    # All weights 1, and all pixels of other classes taken: these are counted, and a difference of counts is exact.
    COUNTED: tl.constexpr = weights is None and sets is None
    tau_inverse = tl.full((), inverse_temperature, REAL)
    zero, one = tl.full((), 0.0, REAL), tl.full((), 1.0, REAL)
    rows = partials + chunk * (NUM_PARTIALS * K)  # of this chunk
    begin_chunk(rows, diagnostics + chunk * 4, first, CASE)
    tl.debug_barrier()
    total_weight = zero

    first_tile, end = tiles_of_chunk(chunk, tiling)
    for tile in tl.range(first_tile, end, disable_licm=not CASE.HOISTED):
        image, pixel, index, inside = tile_of_pixels(tile, tiling, CASE.BM, CASE.INDEX)
        label, weight, bad_label, bad_weight, raw_label, raw_weight = read_pixels(
            index, inside, labels, weights, sampling, K, REAL
        )
        if (first == 0) & (tl.max((bad_label | bad_weight).to(tl.int32), 0) > 0):
            note_bad(diagnostics + chunk * 4, raw_label, bad_label)
            note_bad(diagnostics + chunk * 4 + 2, raw_weight.to(tl.float64).to(tl.int64, bitcast=True), bad_weight)

        # Opaque: else the compiler keeps the addresses of all blocks in registers from tile to tile.
        classes = first + opaque(tl.arange(0, KB), CASE)
        s, _ = similarities_of_blocks(features, anchors, image, pixel, inside, classes, tau_inverse, CASE)
        total_weight += tl.sum(weight, 0)
        normaliser = weight
        if CASE.PIXEL_ANCHOR:
            if log_normaliser is None:
                normaliser = log_sum_of_blocks(s, CASE)
            else:
                normaliser = tl.load(log_normaliser + index, mask=inside, other=0.0)
        own_s = tl.full((KB, CASE.BM), 0.0, REAL)
        # In float32 Triton 3.6 spills 16 to 32 bytes where these stay from tile to tile; elsewhere 8 where they do not.
        ANEW: tl.constexpr = not CASE.HOISTED or (CASE.TENSOR_CORES and CASE.PARTS == 1)
        for block in tl.static_range(BLOCKS):
            k = classes + block * KB if ANEW else first + block * KB + tl.arange(0, KB)
            own_s = tl.where(label[None, :] == k[:, None], s[block], own_s)
        lowest = tl.where(first == 0, -1, first)  # pixels outside V, label -1, are left to the first program
        ours = (label >= lowest) & (label < first + BLOCKS * KB)
        tl.store(positive + index, tl.sum(own_s, 0), mask=inside & ours)

        factor, log_weight = one, one  # without weights: a number, which takes no register
        if weights is not None:
            factor, log_weight = weight[None, :], tl.log(weight)[None, :]
        key = sampling_key(index, sets)
        for block in tl.static_range(BLOCKS):
            k = classes + block * KB
            row = rows + k
            own, negative = members(label, k, key, sets, K)
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
            sums = sums_over_pixels(summands, CASE.INTERPRETED)
            weight_sum = tl.load(row + WEIGHT * K, mask=k < K, other=0.0) + sums[0]
            positive_sum = tl.load(row + POSITIVE_SUM * K, mask=k < K, other=0.0) + sums[1]
            negative_weight, hardest, pixel_loss_sum = total_weight - weight_sum, weight_sum, weight_sum
            if not COUNTED:
                negative_weight = tl.load(row + NEGATIVE_WEIGHT * K, mask=k < K, other=0.0) + sums[2]
            if HARDEST:
                hardest = tl.load(row + HARDEST_NEGATIVE * K, mask=k < K, other=0.0)
                hardest = tl.maximum(hardest, tl.max(tl.where(negative, s[block], float("-inf")), 1))
            if CASE.PIXEL_ANCHOR:
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
            if CASE.PIXEL_ANCHOR:
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
def log_normaliser_kernel(features, anchors, log_normaliser, tiling, inverse_temperature: "fp64", CASE: tl.constexpr):
    """(5): logsumexp_c S_ci of each pixel, for the twin where the classes do not fit into one program."""
    image, pixel, index, inside = tile_of_pixels(tl.program_id(0), tiling, CASE.BM, CASE.INDEX)
    tau_inverse = tl.full((), inverse_temperature, CASE.REAL)
    top = tl.full((CASE.BM,), float("-inf"), CASE.REAL)
    total = tl.full((CASE.BM,), 0.0, CASE.REAL)
    for k0 in range(0, CASE.K, CASE.KB):
        k = k0 + tl.arange(0, CASE.KB)
        s, _ = similarities_of_blocks(features, anchors, image, pixel, inside, k, tau_inverse, CASE)
        top, total = add_to_log_sum(top, total, tl.where((k < CASE.K)[:, None], s[0], float("-inf")), 0)
    tl.store(log_normaliser + index, top + tl.log(total), mask=inside)
