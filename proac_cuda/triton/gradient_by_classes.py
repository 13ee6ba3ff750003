"""Stage (iii) for many classes: the gradient of the features in blocks of classes, one after the other.

As in :mod:`.backward`, but g grows over the blocks of classes, while a program holds the features of its tile in registers from
S to dx: up to D = DO each is read once, each gradient written once; HELD channels of a block of prototypes are read once for
both products.
Beyond that a program makes DO channels of the gradient and streams the others through, once to find |x| and once for each
block of classes; the programs that share a tile follow each other, so that it is found in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import add_gradient, gradient_of_similarities, operands, store_gradient
from .forward import add_to_log_sum, times
from .pixels import kernel, read_pixels, tile_of_pixels
from .vectors import add_products, add_squares, load_features, load_parts, norm_and_inverse, opaque


@triton.jit
def load_blocks(
    features, image, pixel, inside, d_first, strides,
    D: tl.constexpr, BD: tl.constexpr, DO: tl.constexpr, REAL: tl.constexpr, kept=None,
):  # fmt: skip
    """DO channels of a tile, the first BD of which are d_first, as a tuple of blocks (BD, BM), and 1/|x|; 0 for pixels that are not ``kept``."""
    blocks = ()
    squares = tl.full((BD, pixel.shape[0]), 0.0, REAL)
    far_squares = squares
    for part in tl.static_range(DO // BD):
        x = load_features(features, image, pixel, inside, d_first + part * BD, strides, D)
        if kept is not None:  # not as the load's mask, which would be one of single numbers
            x = tl.where(kept[None, :], x, tl.zeros_like(x))
        squares, far_squares = add_squares(squares, far_squares, x.to(REAL))
        blocks = blocks + (x,)
    if D > DO:  # these blocks are not all of x
        squares = tl.full((BD, pixel.shape[0]), 0.0, REAL)
        far_squares = squares
        for d1 in range(0, D, BD):
            x = load_features(features, image, pixel, inside, d1 + tl.arange(0, BD), strides, D)
            squares, far_squares = add_squares(squares, far_squares, x.to(REAL))
    _, inverse = norm_and_inverse(tl.sum(squares, 0), tl.sum(far_squares, 0))
    return blocks, inverse


@triton.jit
def products(
    blocks, features, anchors, image, pixel, inside, k, strides,
    D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, BD: tl.constexpr, RESIDENT: tl.constexpr,
    REAL: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """<phat_k, x_i>, (KB, BM), and the blocks of phat that it was made of, as a tuple.

    x is in registers as ``blocks``; or, where those are not all channels, read from memory, and the tuple is empty.
    """
    total = tl.full((k.shape[0], pixel.shape[0]), 0.0, REAL)
    rows = ()
    if RESIDENT:
        for block in tl.static_range(len(blocks)):
            d = block * BD + tl.arange(0, BD)
            x = opaque(blocks[block], REGISTERS)
            parts = load_parts(anchors, k, d, K_PAD, D_PAD)
            total = add_products(total, parts, x, PRECISION, INTERPRETED)
            rows = rows + (parts,)
    else:
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            x = load_features(features, image, pixel, inside, d, strides, D)
            parts = load_parts(anchors, k, d, K_PAD, D_PAD)
            total = add_products(total, parts, x, PRECISION, INTERPRETED)
    return total, rows


@triton.jit
def normaliser_of_pixels(
    blocks, features, anchors, image, pixel, inside, inverse, strides,
    K: tl.constexpr, D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, KB: tl.constexpr, BD: tl.constexpr,
    RESIDENT: tl.constexpr, REAL: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    REGISTERS: tl.constexpr,
):  # fmt: skip
    """logsumexp_c S_ci of a tile's pixels; ``inverse`` is 1/(|x| tau)."""
    top = tl.full(inverse.shape, float("-inf"), REAL)
    total = tl.full(inverse.shape, 0.0, REAL)
    for k0 in range(0, K, KB):
        k = k0 + tl.arange(0, KB)
        total_products, _ = products(
            blocks, features, anchors, image, pixel, inside, k, strides,
            D, K_PAD, D_PAD, BD, RESIDENT, REAL, PRECISION, INTERPRETED, REGISTERS,
        )  # fmt: skip
        s = tl.where((k < K)[:, None], total_products * inverse[None, :], float("-inf"))
        top, total = add_to_log_sum(top, total, s, 0)
    return top + tl.log(total)


@kernel
def gradient_by_classes_kernel(
    features, grad_features, anchors, coefficients, labels, weights, thresholds, rng_state,
    inverse_temperature: "fp64", ignore_index, P, tiles_per_image,
    strides, grad_strides, size, label_size, scale, label_strides, weight_strides,
    K: tl.constexpr, D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, PIXEL_ANCHOR: tl.constexpr,
    KB: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, DO: tl.constexpr, HELD: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, INTERPRETED: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """(11) for DO channels of a tile of pixels."""
    REAL: tl.constexpr = coefficients.dtype.element_ty
    PART: tl.constexpr = anchors.dtype.element_ty
    RESIDENT: tl.constexpr = D <= DO
    BLOCKS: tl.constexpr = DO // BD
    SHARES: tl.constexpr = (D + DO - 1) // DO
    tile = tl.program_id(0) // SHARES
    d_first = tl.program_id(0) % SHARES * DO
    image, pixel, index, inside = tile_of_pixels(tile, tiles_per_image, P, BM, INDEX)
    label, weight, _, _, _, _ = read_pixels(
        index, inside, labels, label_strides, weights, weight_strides, size, label_size, scale, ignore_index, K,
        REAL,
    )  # fmt: skip
    tau_inverse = tl.full((), inverse_temperature, REAL)
    x, inverse = load_blocks(features, image, pixel, inside, d_first + tl.arange(0, BD), strides, D, BD, DO, REAL)
    normaliser = inverse
    if PIXEL_ANCHOR:
        normaliser = normaliser_of_pixels(
            x, features, anchors, image, pixel, inside, inverse * tau_inverse, strides,
            K, D, K_PAD, D_PAD, KB, BD, RESIDENT, REAL, PRECISION, INTERPRETED, REGISTERS,
        )  # fmt: skip
    g = times(tl.full((BD, BM), 0.0, REAL), BLOCKS)
    along = tl.full((BM,), 0.0, REAL)
    for k0 in range(0, K, KB):
        k = k0 + tl.arange(0, KB)
        total, rows = products(
            x, features, anchors, image, pixel, inside, k, strides,
            D, K_PAD, D_PAD, BD, RESIDENT, REAL, PRECISION, INTERPRETED, REGISTERS,
        )  # fmt: skip
        s = total * (inverse * tau_inverse)[None, :]
        grad = gradient_of_similarities(
            s, label, weight, normaliser, k, index, coefficients, thresholds, rng_state, K, K_PAD, PIXEL_ANCHOR,
            weights is not None,
        )  # fmt: skip
        along += tl.sum(grad * s, 0)
        grad_operands = operands(grad * tau_inverse, 0, PART, INTERPRETED)
        grown = ()
        for block in tl.static_range(BLOCKS):
            if RESIDENT and block * BD < HELD:
                parts = opaque_parts(rows[block], REGISTERS)
            else:
                d = d_first + block * BD + tl.arange(0, BD)
                parts = load_parts(anchors, k, d, K_PAD, D_PAD, AGAIN=True)
            grown = grown + (add_gradient(g[block], parts, grad_operands, PRECISION, INTERPRETED),)
        g = grown
    for block in tl.static_range(BLOCKS):
        d = d_first + block * BD + tl.arange(0, BD)
        own = opaque(x[block], REGISTERS)
        store_gradient(
            grad_features, image, pixel, inside, d, grad_strides, g[block], own, along, inverse, label >= 0, D, INTERPRETED,
        )  # fmt: skip


@triton.jit
def opaque_parts(parts, REGISTERS: tl.constexpr):
    """:func:`.vectors.opaque` of each: the form in which a product took them is not kept for the next."""
    if len(parts) == 2:
        return (opaque(parts[0], REGISTERS), opaque(parts[1], REGISTERS))
    else:
        return (opaque(parts[0], REGISTERS),)
