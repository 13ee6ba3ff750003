r"""Sampled negative sets, equation (2): for each class, the M-th smallest (key, index) among the pixels of other classes.

A radix select. The pair is read in digits of 8 bits, highest first: the four of the key, then those of the pixel's index,
which only part equal keys. For each digit one kernel counts, for each class, the pixels of other classes by that digit,
among those that agree with the digits found so far; the next kernel picks the digit in which the M-th one lies. Counts are
integers, so that the order of the atomic additions leaves no trace, and every backend finds the same pairs.

All classes share the first digit's candidates, V: there one count for V and one for each P_k do, (V \ P_k) = V - P_k.
"""

from __future__ import annotations

import triton.language as tl

from .pixels import kernel, random_keys, read_pixels, tile_of_pixels


@kernel
def count_digits_kernel(
    labels, weights, rng_state, thresholds, histogram,
    shift, tiling, sampling,
    FIRST: tl.constexpr, OF_INDEX: tl.constexpr, REAL: tl.constexpr,
    K: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Add a tile's pixels to the histograms (K + 1, 256): of P_k and V for the first digit, else of V minus P_k."""
    image, pixel, index, inside = tile_of_pixels(tl.program_id(0), tiling, BM, INDEX)
    label, _, _, _, _, _ = read_pixels(index, inside, labels, weights, sampling, K, REAL)
    kept = label >= 0
    key = random_keys(index, rng_state).to(tl.int64)
    value = index.to(tl.int64) if OF_INDEX else key
    digit = (value >> shift) & 255
    one = tl.full((BM,), 1, tl.int64)
    if FIRST:
        tl.atomic_add(histogram + label.to(tl.int64) * 256 + digit, one, mask=kept, sem="relaxed")
        tl.atomic_add(histogram + K * 256 + digit, one, mask=kept, sem="relaxed")
    else:
        k = tl.program_id(1) * KB + tl.arange(0, KB)
        found_key = tl.load(thresholds + 2 * k, mask=k < K, other=-1)[:, None]
        if OF_INDEX:
            found = tl.load(thresholds + 2 * k + 1, mask=k < K, other=-1)[:, None]
            match = (key[None, :] == found_key) & ((value[None, :] >> (shift + 8)) == (found >> (shift + 8)))
        else:
            match = (key[None, :] >> (shift + 8)) == (found_key >> (shift + 8))
        match = match & (kept & inside)[None, :] & (label[None, :] != k[:, None]) & (k < K)[:, None]
        target = histogram + k[:, None].to(tl.int64) * 256 + digit[None, :]
        tl.atomic_add(target, tl.full((KB, BM), 1, tl.int64), mask=match, sem="relaxed")


@kernel
def pick_digit_kernel(
    histogram, thresholds, ranks, rng_state, num_negatives, shift,
    FIRST: tl.constexpr, OF_INDEX: tl.constexpr, LAST: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Find the digit of one class's threshold, and clear its histogram for the next. Without enough pixels: (2^32, 0)."""
    k = tl.program_id(0).to(tl.int64)
    digits = tl.arange(0, 256)
    counts = tl.load(histogram + k * 256 + digits)
    tl.store(histogram + k * 256 + digits, tl.zeros_like(counts))
    if FIRST:
        counts = tl.load(histogram + K * 256 + digits) - counts
        rank = tl.full((), 0, tl.int64) + num_negatives
        key, index = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
        all_taken = tl.sum(counts, 0) <= rank
    else:
        rank = tl.load(ranks + k)
        key, index = tl.load(thresholds + 2 * k), tl.load(thresholds + 2 * k + 1)
        all_taken = key == 4294967296
    below = tl.cumsum(counts, 0)
    before = below < rank
    digit = tl.sum(before.to(tl.int64), 0)
    rank -= tl.sum(tl.where(before, counts, 0), 0)
    if OF_INDEX:
        index += digit << shift
        if LAST:
            index += tl.load(rng_state + 1)
    else:
        key += digit << shift
    tl.store(ranks + k, rank)
    tl.store(thresholds + 2 * k, tl.where(all_taken, 4294967296, key))
    tl.store(thresholds + 2 * k + 1, tl.where(all_taken, 0, index))
