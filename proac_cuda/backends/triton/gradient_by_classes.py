"""Stage (iii) for many classes: the gradient of the features in blocks of classes, one after the other.

As in :mod:`.backward`, but g grows over the blocks of classes, while a program holds the features of its tile from S to dx: up
to D = DO each is read once, each gradient written once; HELD channels of a block of prototypes are read once for both products.
16-bit features lie in shared memory meanwhile (SHARED; not on AMD), and registers are for g. Triton puts there what nothing
but products take, so that the features are used for dx as a product, too: with the unit matrix, which is exact.
With PIXEL_ROWS both factors of every product lie there: the matrix unit of sm_90 reads them itself, 64 rows at a time.
In float16 g is in units of the pixel's largest coefficient so far, since coefficients have more orders of size than it has.
Beyond that a program makes DO channels of the gradient and streams the others through, once to find |x| and once for each
block of classes; the programs that share a tile follow each other, so that it is found in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import add_gradient, add_to_normaliser, gradient_of_similarities, normaliser_of, store_gradient
from .forward import times
from .pixels import kernel, read_pixels, sampling_key, tile_of_pixels
from .vectors import (
    add_products,
    add_squares,
    dot_with_pixels,
    load_features,
    load_parts,
    no_products,
    norm_and_inverse,
    once,
    opaque,
    split,
    turned,
)


@triton.jit
def load_blocks(features, image, pixel, inside, d_first, CASE: tl.constexpr, kept=None):
    """DO channels of a tile, the first BD of which are d_first, as a tuple of blocks (BD, BM), and 1/|x|.

    Both are 0 for pixels that are not ``kept``.
    """
    blocks = ()
    squares = tl.full((CASE.BD, CASE.BM), 0.0, CASE.REAL)
    far_squares = squares
    for part in tl.static_range(CASE.DO // CASE.BD):
        x = load_features(features, image, pixel, inside, d_first + part * CASE.BD, CASE)
        if kept is not None:  # not as the load's mask, which would be one of single numbers
            x = tl.where(kept[None, :], x, tl.zeros_like(x))
        squares, far_squares = add_squares(squares, far_squares, x.to(CASE.REAL))
        blocks = blocks + (x,)
    if CASE.D > CASE.DO:  # these blocks are not all of x
        squares = tl.full((CASE.BD, CASE.BM), 0.0, CASE.REAL)
        far_squares = squares
        for d1 in range(0, CASE.D, CASE.BD):
            x = load_features(features, image, pixel, inside, d1 + tl.arange(0, CASE.BD), CASE)
            squares, far_squares = add_squares(squares, far_squares, x.to(CASE.REAL))
    _, inverse = norm_and_inverse(tl.sum(squares, 0), tl.sum(far_squares, 0))
    return blocks, inverse


@triton.jit
def products(blocks, features, anchors, image, pixel, inside, k, SHARED: tl.constexpr, CASE: tl.constexpr):
    """<phat_k, x_i>, (KB, BM), and the blocks of phat that it was made of, as a tuple.

    x is there as ``blocks``, in shared memory or in registers; or, where those are not all channels, read from memory, and the
    tuple is empty.
    """
    total = no_products(CASE.KB, CASE)
    rows = ()
    if CASE.D <= CASE.DO:
        for block in tl.static_range(len(blocks)):
            d = block * CASE.BD + tl.arange(0, CASE.BD)
            x = blocks[block]
            parts = load_parts(anchors, k, d, CASE)
            if not SHARED:
                x = opaque(x, CASE)
            total = add_products(total, parts, x, CASE)
            rows = rows + (parts,)
    else:
        for d0 in range(0, CASE.D, CASE.BD):
            d = d0 + tl.arange(0, CASE.BD)
            x = load_features(features, image, pixel, inside, d, CASE)
            total = add_products(total, load_parts(anchors, k, d, CASE), x, CASE)
    return turned(total, CASE), rows


@triton.jit
def normaliser_of_pixels(
    blocks, features, anchors, image, pixel, inside, label, inverse, SHARED: tl.constexpr, CASE: tl.constexpr
):
    """:func:`.backward.normaliser_of` a tile's pixels, over all classes; ``inverse`` is 1/(|x| tau)."""
    top = tl.full((CASE.BM,), float("-inf"), CASE.REAL)
    total = tl.full((CASE.BM,), 0.0, CASE.REAL)
    own = total
    for k0 in range(0, CASE.K, CASE.KB):
        k = k0 + tl.arange(0, CASE.KB)
        total_products, _ = products(blocks, features, anchors, image, pixel, inside, k, SHARED, CASE)
        top, total, own = add_to_normaliser(top, total, own, total_products * inverse[None, :], label, k, CASE)
    return normaliser_of(top, total, own)


@kernel
def gradient_by_classes_kernel(
    features, grad_features, anchors, coefficients, labels, weights, sets,
    tiling, sampling, inverse_temperature: "fp64", CASE: tl.constexpr,
):  # fmt: skip
    """(11) for DO channels of a tile of pixels."""
    BD: tl.constexpr = CASE.BD
    BLOCKS: tl.constexpr = CASE.DO // BD
    SHARES: tl.constexpr = (CASE.D + CASE.DO - 1) // CASE.DO
    SHARED: tl.constexpr = CASE.PARTS == 2 and SHARES == 1 and CASE.REGISTERS != "amd"
    tile = tl.program_id(0) // SHARES
    d_first = tl.program_id(0) % SHARES * CASE.DO
    image, pixel, index, inside = tile_of_pixels(tile, tiling, CASE.BM, CASE.INDEX)
    label, weight, _, _, _, _ = read_pixels(index, inside, labels, weights, sampling, CASE.K, CASE.REAL)
    tau_inverse = tl.full((), inverse_temperature, CASE.REAL)
    x, inverse = load_blocks(features, image, pixel, inside, d_first + tl.arange(0, BD), CASE)
    normaliser = (inverse, inverse)
    if CASE.PIXEL_ANCHOR:
        normaliser = normaliser_of_pixels(
            x, features, anchors, image, pixel, inside, label, inverse * tau_inverse, SHARED, CASE
        )
    g = times(no_products(BD, CASE), BLOCKS)
    along = tl.full((CASE.BM,), 0.0, CASE.REAL)
    key = sampling_key(index, sets)
    peak = tl.full((1, CASE.BM), 1e-37, CASE.REAL)
    for k0 in range(0, CASE.K, CASE.KB):
        k = opaque(k0 + tl.arange(0, CASE.KB), CASE)
        total, rows = products(x, features, anchors, image, pixel, inside, k, SHARED, CASE)
        s = total * inverse[None, :] * tau_inverse
        grad = gradient_of_similarities(
            s, label, weight, normaliser, k, key, coefficients, sets, weights is not None, CASE
        )
        along += tl.sum(grad * s, 0)
        grad *= tau_inverse
        if CASE.PART == tl.float16:
            before = peak
            peak = tl.maximum(peak, tl.max(tl.abs(grad), 0, keep_dims=True))  # of NaN and a number, the number
            g = scaled(g, before / peak, CASE)
            grad /= peak
        high, low = grad, grad
        if CASE.PARTS == 2:
            high, low = split(grad, CASE.PART, CASE.INTERPRETED)
        grown = ()
        for block in tl.static_range(BLOCKS):
            if SHARES == 1 and block * BD < CASE.HELD:
                parts = rows[block]
                if not CASE.PIXEL_ROWS:  # else both products read them where they lie, in shared memory
                    parts = opaque_parts(parts, CASE)
            else:
                parts = load_parts(anchors, k, d_first + block * BD + tl.arange(0, BD), CASE, AGAIN=True)
            grown = grown + (add_gradient(g[block], parts, (high, low, None), CASE),)
        g = grown
    if CASE.PART == tl.float16:
        g = scaled(g, peak, CASE)
    image, pixel, index, inside = tile_of_pixels(opaque(tile, CASE), tiling, CASE.BM, CASE.INDEX)
    if SHARED:
        # Features are read from shared memory in the loop where they are used: in front of it all of them would be at once.
        for _turn in range(once(CASE)):
            start = d_first + once(CASE) - 1
            same = (start + tl.arange(0, BD))[:, None] == (d_first + tl.arange(0, BD))[None, :]
            unit = tl.where(same, 1.0, 0.0).to(x[0].dtype)
            for block in tl.static_range(BLOCKS):
                d = start + block * BD + tl.arange(0, BD)
                own = turned(dot_with_pixels(unit, x[block], no_products(BD, CASE), CASE), CASE)
                grown = turned(g[block], CASE)
                store_gradient(grad_features, image, pixel, inside, d, grown, own, along, inverse, label >= 0, CASE)
    else:
        for block in tl.static_range(BLOCKS):
            d = d_first + block * BD + tl.arange(0, BD)
            own, grown = opaque(x[block], CASE), turned(g[block], CASE)
            store_gradient(grad_features, image, pixel, inside, d, grown, own, along, inverse, label >= 0, CASE)


@triton.jit
def scaled(blocks, factor, CASE: tl.constexpr):
    """Blocks of g times a factor for each pixel, (1, BM)."""
    result = ()
    for block in tl.static_range(len(blocks)):
        result = result + (blocks[block] * turned(factor, CASE),)
    return result


@triton.jit
def opaque_parts(parts, CASE: tl.constexpr):
    """:func:`.vectors.opaque` of each: the form in which a product took them is not kept for the next."""
    if CASE.PARTS == 2:
        return (opaque(parts[0], CASE), opaque(parts[1], CASE))
    else:
        return (opaque(parts[0], CASE),)
