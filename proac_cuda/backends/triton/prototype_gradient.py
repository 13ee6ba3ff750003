"""Stage (iii) for the prototypes: equation (11) with the roles exchanged, in two deterministic steps.

Each chunk of pixels leaves its sum_i dL/dS_ki xhat_i / tau, (K, D); a second kernel adds the chunks in their order and takes
away the part along phat. A program sums BLOCKS blocks of KB classes, and holds the features of a tile from S to the sum: up to
D = DO it reads each once. The programs of a chunk that deal with other classes follow each
other, so that its features are found in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import gradient_of_similarities, operands
from .forward import similarities_of_blocks, times
from .gradient_by_classes import load_blocks, normaliser_of_pixels, products
from .pixels import kernel, read_pixels, sampling_key, tile_of_pixels, tiles_of_chunk
from .vectors import EPS, dot, opaque


@kernel
def prototype_gradient_kernel(
    features, partials, anchors, coefficients, labels, weights, sets,
    tiling, sampling, inverse_temperature: "fp64", CASE: tl.constexpr,
):  # fmt: skip
    """sum_i G_ki xhat_i / tau for BLOCKS x KB classes (program axis 0), DO channels (axis 1), a chunk of pixels (axis 2)."""
    K: tl.constexpr = CASE.K
    D: tl.constexpr = CASE.D
    KB: tl.constexpr = CASE.KB
    BD: tl.constexpr = CASE.BD
    PARTS: tl.constexpr = CASE.DO // BD
    first, d_first = tl.program_id(0) * CASE.BLOCKS * KB, tl.program_id(1) * CASE.DO
    chunk = tl.program_id(2)
    tau_inverse = tl.full((), inverse_temperature, CASE.REAL)
    sums = times(times(tl.full((KB, BD), 0.0, CASE.REAL), PARTS), CASE.BLOCKS)
    first_tile, end = tiles_of_chunk(chunk, tiling)
    for tile in range(first_tile, end):
        image, pixel, index, inside = tile_of_pixels(tile, tiling, CASE.BM, CASE.INDEX)
        label, weight, _, _, _, _ = read_pixels(index, inside, labels, weights, sampling, K, CASE.REAL)
        # Opaque: else the compiler keeps the addresses of all blocks in registers from tile to tile.
        classes = first + opaque(tl.arange(0, KB), CASE)
        channels = d_first + (tl.arange(0, BD) if CASE.HOISTED else opaque(tl.arange(0, BD), CASE))
        kept = label >= 0  # pixels outside V count as 0: 0 times their NaN would be NaN
        x, inverse = load_blocks(features, image, pixel, inside, channels, CASE, kept)
        s = ()
        if D > CASE.DO:
            s, inverse = similarities_of_blocks(features, anchors, image, pixel, inside, classes, tau_inverse, CASE)
            inverse = tl.where(kept, inverse, 0.0)
        normaliser = (inverse, inverse)
        if CASE.PIXEL_ANCHOR:
            normaliser = normaliser_of_pixels(
                x, features, anchors, image, pixel, inside, label, inverse * tau_inverse, False, CASE
            )
        key = sampling_key(index, sets)
        grown = ()
        for block in tl.static_range(len(sums)):
            k = classes + block * KB
            if D <= CASE.DO:
                total, _ = products(x, features, anchors, image, pixel, inside, k, False, CASE)
                similarity = total * (inverse * tau_inverse)[None, :]
            else:
                similarity = s[block]
            grad = gradient_of_similarities(
                similarity, label, weight, normaliser, k, key, coefficients, sets, weights is not None, CASE
            )
            grad_operands = operands(grad * (inverse * tau_inverse)[None, :], 1, CASE)
            grown = grown + (add_outer(sums[block], grad_operands, x, CASE),)
        sums = grown
    for block in tl.static_range(len(sums)):
        k = first + block * KB + opaque(tl.arange(0, KB), CASE)
        row = partials + (chunk.to(tl.int64) * K + k)[:, None] * D
        for part in tl.static_range(PARTS):
            d = d_first + part * BD + opaque(tl.arange(0, BD), CASE)
            tl.store(row + d[None, :], sums[block][part], mask=(k < K)[:, None] & (d < D)[None, :])


@triton.jit
def add_outer(sums, grad, blocks, CASE: tl.constexpr):
    """``sums``, a tuple of (KB, BD), + sum over a tile's pixels of G_ki x_i.

    ``grad`` is of :func:`.backward.operands`, and x stands in ``blocks`` (BD, BM).
    """
    high, low, peak = grad
    grown = ()
    for part in tl.static_range(len(sums)):
        x = tl.trans(opaque(blocks[part], CASE).to(high.dtype))
        if CASE.PARTS == 2:
            tile_sum = dot(low, x, tl.zeros_like(sums[part]), CASE)
            grown = grown + (sums[part] + dot(high, x, tile_sum, CASE) * peak,)
        else:
            grown = grown + (dot(high, x, sums[part], CASE),)
    return grown


@kernel
def merge_prototype_gradient_kernel(
    partials, prototypes, norms, grad_prototypes, chunks, K: tl.constexpr, D: tl.constexpr, DB: tl.constexpr
):
    """(11) with the roles exchanged, for one class: the sum over chunks in their order, without its part along phat."""
    REAL: tl.constexpr = partials.dtype.element_ty
    k = tl.program_id(0)
    norm = tl.load(norms + k)
    inverse = tl.where(norm <= EPS, 0.0, 1.0 / norm)
    along = tl.full((DB,), 0.0, REAL)
    for d0 in range(0, D, DB):
        d = d0 + tl.arange(0, DB)
        g = chunk_sum(partials, k, d, chunks, K, D)
        unit = tl.load(prototypes + k * D + d, mask=d < D, other=0.0) * inverse
        along += g * unit
    along_sum = tl.sum(along, 0)
    for d0 in range(0, D, DB):
        d = d0 + tl.arange(0, DB)
        g = chunk_sum(partials, k, d, chunks, K, D)
        unit = tl.load(prototypes + k * D + d, mask=d < D, other=0.0) * inverse
        tl.store(grad_prototypes + k * D + d, (g - along_sum * unit) * inverse, mask=d < D)


@triton.jit
def chunk_sum(partials, k, d, chunks, K: tl.constexpr, D: tl.constexpr):
    """Channels d of class k, summed over the chunks in their order."""
    total = tl.full(d.shape, 0.0, partials.dtype.element_ty)
    for chunk in range(chunks):
        total += tl.load(partials + (tl.full((), chunk, tl.int64) * K + k) * D + d, mask=d < D, other=0.0)
    return total
