"""What every kernel needs to know of a pixel, once: its label, its weight, its random key, the sets it belongs to.

The rules are those of :mod:`proac_cuda.stages.pixels`. A kernel sees the pixels as ``B`` images of ``P`` pixels each;
``index`` is the linear index of a pixel in (B, spatial) order. A vector over pixels has length BM, one over classes length
KB, and a matrix of both is (KB, BM): pixels along the columns, so that a class's sum over pixels stays within a warp.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

#: Decorates kernels. A training run sees many sizes, and each combination of integers that Triton finds to be 1 or divisible by
#: 16 would be one more compilation, seconds each in the middle of a step. Only the strides and the extent of the features
#: (P) earn that, by the wide loads which they allow.
kernel = functools.partial(
    triton.jit,
    do_not_specialize=("chunks", "num_negatives", "grad_stride", "shift"),
    do_not_specialize_on_alignment=("labels", "weights", "class_weight", "grad_loss"),
)  # fmt: skip

#: Integers in tuples cannot be left out in that way. They are passed times 16, divisible by 16 and not 1, all of them: those of
#: `layout.Tiling` but for per_image, and of `layout.Sampling` but for ignore_index, which a run seldom changes.
TUPLE_UNIT = 16
_UNIT_BITS = tl.constexpr(4)


@triton.jit
def tile_of_pixels(tile, tiling, BM: tl.constexpr, INDEX: tl.constexpr):
    """Image, pixel within it, linear index and "is there such a pixel" of a tile; no tile crosses an image's end."""
    tile = tl.full((), tile, INDEX)
    P = tiling.per_image
    tiles_per_image = tiling.tiles_per_image >> _UNIT_BITS
    image = tile // tiles_per_image
    pixel = tile % tiles_per_image * BM + tl.arange(0, BM)
    return image, pixel, image * P + pixel, pixel < P


@triton.jit
def tiles_of_chunk(chunk, tiling):
    """The first tile of a chunk, and the one after its last."""
    per_chunk = tiling.tiles_per_chunk >> _UNIT_BITS
    return chunk * per_chunk, tl.minimum((chunk + 1) * per_chunk, tiling.tiles >> _UNIT_BITS)


@triton.jit
def nearest(index, label_size, scale, shift):
    """Where ``index`` of a feature axis reads an axis of the labels; ``scale`` is 0 where the sizes agree."""
    read = tl.minimum(((index.to(tl.float32) + shift) * scale).to(index.dtype), label_size - 1)
    return tl.where(scale == 0, index, read)


@triton.jit
def label_position(index, sampling):
    """Where the labels are read for the pixel ``index``: the image and an index for each spatial axis, in its type."""
    size, label_size, scale = sampling.size, sampling.label_size, sampling.scale
    position = ()
    rest = index
    for axis in tl.static_range(len(size) - 1, -1, -1):
        length = size[axis] >> _UNIT_BITS
        position = (nearest(rest % length, label_size[axis] >> _UNIT_BITS, scale[axis], scale[len(size)]),) + position
        rest = rest // length
    return (rest,) + position


@triton.jit
def read_at(values, position, strides, mask):
    """``values`` at a position of :func:`label_position`, 0 where masked."""
    offset = position[0].to(tl.int64) * (strides[0] >> _UNIT_BITS)
    for axis in tl.static_range(1, len(strides)):
        offset += position[axis].to(tl.int64) * (strides[axis] >> _UNIT_BITS)
    return tl.load(values + offset, mask=mask, other=0)


@triton.jit
def read_pixels(index, inside, labels, weights, sampling, K, REAL):
    """Section 3's set V.

    Returns the label (int32, -1 outside V), the weight (0 outside V), "label invalid", "weight invalid", and the label and
    the weight as they were read.
    """
    position = label_position(index, sampling)
    raw_label = read_at(labels, position, sampling.label_strides, inside).to(tl.int64)
    in_range = (raw_label >= 0) & (raw_label < K)
    ignored = raw_label == sampling.ignore_index
    kept = inside & in_range & ~ignored
    bad_label = inside & ~(in_range | ignored)
    bad_weight = kept & False
    weight = tl.where(kept, 1.0, 0.0).to(REAL)
    raw_weight = weight
    if weights is not None:
        raw_weight = read_at(weights, position, sampling.weight_strides, inside)
        good = (raw_weight >= 0) & (raw_weight < float("inf"))
        bad_weight = kept & ~good
        smallest_normal: tl.constexpr = 2.0**-1022 if REAL == tl.float64 else 2.0**-126  # its inverse is finite
        kept = kept & good & (raw_weight >= smallest_normal)
        weight = tl.where(kept, raw_weight, 0.0)
    return tl.where(kept, raw_label, -1).to(tl.int32), weight, bad_label, bad_weight, raw_label, raw_weight


@triton.jit
def random_keys(index, rng_state):
    """First output word of Philox4x32-10 for each pixel, by its index over all ranks; uint32."""
    overall = index.to(tl.int64) + tl.load(rng_state + 1)
    low, high = (overall & 0xFFFFFFFF).to(tl.uint32), ((overall >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros_like(low)
    key, _, _, _ = tl.philox(tl.load(rng_state), low, high, zero, zero)
    return key


@triton.jit
def sampling_key(index, sets):
    """What sampled sets order pixels by: (:func:`random_keys`, index); None where all pixels of other classes are taken."""
    key = None
    if sets is not None:
        key = (random_keys(index, sets.rng_state), index)
    return key


@triton.jit
def members(label, k, key, sets, K):
    """(2): which of the pixels are in P_k and which in N_k, (KB, BM) each; ``key`` is of :func:`sampling_key`."""
    own = label[None, :] == k[:, None]
    negative = (label >= 0)[None, :] & (k < K)[:, None] & ~own
    if sets is not None:
        last, last_index = last_members(k, key[1].dtype, sets, K)
        drawn, index = key[0][None, :], key[1][None, :]
        negative = negative & ((drawn < last) | ((drawn == last) & (index <= last_index)))
    return own, negative


@triton.jit
def last_members(k, INDEX: tl.constexpr, sets, K):
    """The last (random key, index) of each class's set, (KB, 1), in the types of the pixels', which take half the registers."""
    most: tl.constexpr = 2**31 - 1 if INDEX == tl.int32 else 2**63 - 1
    key = tl.load(sets.thresholds + 2 * k, mask=k < K, other=0)
    index = tl.load(sets.thresholds + 2 * k + 1, mask=k < K, other=0) - tl.load(sets.rng_state + 1)
    all_taken = key > 0xFFFFFFFF
    index = tl.where(all_taken, most, tl.minimum(tl.maximum(index, -1), most))
    return tl.where(all_taken, 0xFFFFFFFF, key).to(tl.uint32)[:, None], index.to(INDEX)[:, None]
