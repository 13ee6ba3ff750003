"""Stage (iii) for many classes: the gradient of the features in blocks of classes, one after the other.

As in :mod:`.backward`, but g of DG channels grows over the blocks of classes, while a program holds the features of its tile
in registers from S to dx: each is read once and each gradient written once, up to D = DO; S is made anew for each DG
channels. Beyond that a program makes DO channels of the gradient and streams the others through, once to find |x| and once
for each block of classes; the programs that share a tile follow each other, so that it is found in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import add_gradient, gradient_of_similarities, operands, store_gradient
from .forward import add_to_log_sum
from .pixels import kernel, read_pixels, tile_of_pixels
from .vectors import add_products, add_squares, load_features, norm_and_inverse, opaque


@triton.jit
def load_blocks(
    features, image, pixel, inside, d0, strides,
    D: tl.constexpr, BD: tl.constexpr, DO: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """DO channels of a tile from d0 on, as a tuple of blocks (BD, BM), and 1/|x|."""
    blocks = ()
    squares = tl.full((BD, pixel.shape[0]), 0.0, REAL)
    far_squares = squares
    for part in tl.static_range(DO // BD):
        d = d0 + part * BD + tl.arange(0, BD)
        x = load_features(features, image, pixel, inside, d, strides, D)
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
    blocks, features, anchors, image, pixel, inside, k0, classes, k, strides,
    K: tl.constexpr, D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, BD: tl.constexpr, RESIDENT: tl.constexpr,
    REAL: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """<phat_k, x_i>, (KB, BM), from the blocks in registers or, where those are not all channels, from memory."""
    total = tl.full((k.shape[0], pixel.shape[0]), 0.0, REAL)
    if RESIDENT:
        for part in tl.static_range(len(blocks)):
            d = part * BD + tl.arange(0, BD)
            x = opaque(blocks[part], REGISTERS)
            total = add_products(total, anchors, x, k, d, K_PAD, D_PAD, PRECISION, INTERPRETED)
    else:
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            x = load_features(features, image, pixel, inside, d, strides, D)
            total = add_products(total, anchors, x, k, d, K_PAD, D_PAD, PRECISION, INTERPRETED)
    return total


@triton.jit
def normaliser_of_pixels(
    blocks, features, anchors, image, pixel, inside, inverse, classes, strides,
    K: tl.constexpr, D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, KB: tl.constexpr, BD: tl.constexpr,
    RESIDENT: tl.constexpr, REAL: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    REGISTERS: tl.constexpr,
):  # fmt: skip
    """logsumexp_c S_ci of a tile's pixels; ``inverse`` is 1/(|x| tau)."""
    top = tl.full(inverse.shape, float("-inf"), REAL)
    total = tl.full(inverse.shape, 0.0, REAL)
    for k0 in range(0, K, KB):
        k = k0 + tl.arange(0, KB)
        cosines = products(
            blocks, features, anchors, image, pixel, inside, k0, classes, k, strides,
            K, D, K_PAD, D_PAD, BD, RESIDENT, REAL, PRECISION, INTERPRETED, REGISTERS,
        )  # fmt: skip
        s = tl.where((k < K)[:, None], cosines * inverse[None, :], float("-inf"))
        top, total = add_to_log_sum(top, total, s, 0)
    return top + tl.log(total)


@kernel
def gradient_by_classes_kernel(
    features, grad_features, anchors, coefficients, labels, weights, thresholds, rng_state,
    inverse_temperature: "fp64", ignore_index, classes, P, tiles_per_image,
    strides, grad_strides, size, label_size, scale, label_strides, weight_strides,
    K: tl.constexpr, D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, PIXEL_ANCHOR: tl.constexpr,
    KB: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, DO: tl.constexpr, DG: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, INTERPRETED: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """(11) for DO channels of a tile of pixels; ``classes`` is K once more, at run time."""
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
    x, inverse = load_blocks(features, image, pixel, inside, d_first, strides, D, BD, DO, REAL)
    normaliser = inverse
    if PIXEL_ANCHOR:
        normaliser = normaliser_of_pixels(
            x, features, anchors, image, pixel, inside, inverse * tau_inverse, classes, strides,
            K, D, K_PAD, D_PAD, KB, BD, RESIDENT, REAL, PRECISION, INTERPRETED, REGISTERS,
        )  # fmt: skip
    for first in tl.static_range(0, BLOCKS, DG // BD):
        sums = ()
        for _ in tl.static_range(DG // BD):
            sums = sums + (tl.full((BD, BM), 0.0, REAL),)
        along = tl.full((BM,), 0.0, REAL)
        done = tl.full((), 0, tl.int32)
        for k0 in range(0, K, KB):
            k = k0 + tl.arange(0, KB)
            total = products(
                x, features, anchors, image, pixel, inside, k0, classes, k, strides,
                K, D, K_PAD, D_PAD, BD, RESIDENT, REAL, PRECISION, INTERPRETED, REGISTERS,
            )  # fmt: skip
            s = total * (inverse * tau_inverse)[None, :]
            grad = gradient_of_similarities(
                s, label, weight, normaliser, k, index, coefficients, thresholds, rng_state, K, K_PAD, PIXEL_ANCHOR,
                weights is not None,
            )  # fmt: skip
            along += tl.sum(grad * s, 0)
            grad_operands = operands(grad * tau_inverse, 0, PART, INTERPRETED)
            grown = ()
            for part in tl.static_range(DG // BD):
                d = d_first + (first + part) * BD + tl.arange(0, BD)
                grown = grown + (
                    add_gradient(sums[part], anchors, k, d, grad_operands, K_PAD, D_PAD, PRECISION, INTERPRETED),
                )
            sums = grown
            done += KB
        for part in tl.static_range(DG // BD):
            d = d_first + (first + part) * BD + tl.arange(0, BD)
            own = opaque(x[first + part], REGISTERS)
            store_gradient(
                grad_features, image, pixel, inside, d, grad_strides, sums[part], own, along, inverse,
                label >= 0, D, INTERPRETED,
            )  # fmt: skip
