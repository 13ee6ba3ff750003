"""The rules of single pixels: Philox against published vectors, the nearest rules against PyTorch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from label_positions import MODES, assert_reads_as_interpolate, interpolated
from proac_cuda.backends import BACKENDS, stage_ops
from proac_cuda.stages.pixels import nearest_index, philox4x32, philox_keys

# Known-answer vectors of Philox4x32-10 as the Random123 library publishes them: counter, key, output.
VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter, key, expected", VECTORS)
def test_philox_vectors(counter, key, expected):
    def tensors(words):
        return tuple(torch.tensor([word]) for word in words)

    assert [word.item() for word in philox4x32(tensors(counter), tensors(key))] == expected
    assert oracle.philox(counter, key) == expected


@given(seed=st.integers(-(2**63), 2**63 - 1), index=st.integers(0, 2**40))
@settings(max_examples=50, deadline=None)
def test_keys_of_any_seed_and_index(seed, index):
    key = philox_keys(torch.tensor(seed), torch.tensor([index]))
    assert key.item() == oracle.pixel_key(seed, index)


def _assert_rule_is_interpolates(label_size, feature_size, mode):
    """Of float32 numbers, or uint8. PyTorch computes in float64 for a float64 tensor, and then reads some others.

    Its CPU kernel for nearest-exact computes (i + 0.5) * scale - 0.5 with one rounding and adds 0.5 again: where the product
    is a whole number but for rounding it may read the next one (44 labels, 1826 features, index 41, PyTorch 2.14.1). What
    holds there is the formula itself, in float32.
    """
    exact = mode == "nearest-exact"
    index = nearest_index(label_size, feature_size, torch.device("cpu"), exact)
    place = np.arange(feature_size, dtype=np.float32) + np.float32(0.5 if exact else 0)
    product = place * (np.float32(label_size) / np.float32(feature_size))
    if label_size != feature_size:
        assert np.array_equal(index, np.minimum(np.floor(product), label_size - 1).astype(np.int64))
    sure = torch.from_numpy(np.abs(product - np.round(product)) > 2 * np.spacing(product)) if exact else slice(None)
    low, high = (
        interpolated(torch.arange(label_size)[None] // unit % 4096, (feature_size,), mode)[0] for unit in (1, 4096)
    )
    assert torch.equal(index[sure], (low + 4096 * high)[sure])


@pytest.mark.parametrize("mode", MODES)
@given(label_size=st.integers(1, 2000), feature_size=st.integers(1, 2000))
@settings(max_examples=100, deadline=None)
def test_nearest_rule_is_interpolates(mode, label_size, feature_size):
    _assert_rule_is_interpolates(label_size, feature_size, mode)


@pytest.mark.parametrize("mode", MODES)
@given(size=st.integers(1, 300), factor=st.integers(1, 33))
@settings(max_examples=50, deadline=None)
def test_nearest_rule_at_whole_strides(mode, size, factor):
    _assert_rule_is_interpolates(size * factor, size, mode)
    _assert_rule_is_interpolates(size, size * factor, mode)
    index = nearest_index(size * factor, size, torch.device("cpu"), mode == "nearest-exact")
    middle = factor // 2 if mode == "nearest-exact" else 0
    assert torch.equal(index, torch.arange(size) * factor + middle)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("label_size, feature_size", [(2**23, 2**22), (2**23 - 1, 5_000_011), (3_000_017, 2**23 - 1)])
def test_nearest_rule_of_large_axes(mode, label_size, feature_size):
    """Beyond 2^23 float32 has no halves: there PyTorch's CPU kernel for nearest-exact, which takes 0.5 off a product and
    adds it again, reads other places than (i + 0.5) * scale in float32 says.
    """
    _assert_rule_is_interpolates(label_size, feature_size, mode)


def test_nearest_exact_where_the_product_is_nearly_whole():
    """41.5 * 44 / 1826 is 1 but for rounding: 0.99999994 in float32, of which the formula reads 0."""
    _assert_rule_is_interpolates(44, 1826, "nearest-exact")
    assert nearest_index(44, 1826, torch.device("cpu"), True)[41] == 0


def test_nearest_rule_is_not_the_exact_quotient():
    device = torch.device("cpu")
    assert nearest_index(720, 129, device, False)[43] == 239 != 43 * 720 // 129
    assert nearest_index(4, 41, device, True)[20] == 1 != (2 * 20 + 1) * 4 // (2 * 41)


@pytest.mark.parametrize("mode", MODES)
@given(sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=3))
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_backend_reads_as_interpolate(backend, mode, sizes):
    _assert_backend_reads_as_interpolate(backend, mode, *zip(*sizes, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "size, label_size",
    [
        ((82,), (2,)),  # where float32 reads another pixel than the exact quotient, "nearest"
        ((41,), (4,)),  # and "nearest-exact"
        ((9, 12), (72, 96)),  # stride 8
        ((5, 13), (39, 103)),  # strides that do not divide
        ((8, 10), (2, 5)),  # labels coarser than the features
        ((4, 6), (4, 31)),  # one axis as it is
        ((3, 5, 4), (6, 21, 4)),
    ],
    ids=str,
)
def test_every_backend_reads_these_as_interpolate(backend, mode, size, label_size):
    _assert_backend_reads_as_interpolate(backend, mode, size, label_size)


def _assert_backend_reads_as_interpolate(backend, mode, size, label_size):
    assert_reads_as_interpolate(stage_ops(BACKENDS[backend.name]), size, label_size, mode, backend.device)
