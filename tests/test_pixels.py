"""The rules of single pixels: Philox against published vectors, the nearest rule against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from proac_cuda.pixels import nearest_index, philox4x32, philox_keys

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


@given(label_size=st.integers(1, 2000), feature_size=st.integers(1, 2000))
@settings(max_examples=200, deadline=None)
def test_nearest_rule_is_interpolates(label_size, feature_size):
    values = torch.arange(label_size, dtype=torch.float32)
    expected = torch.nn.functional.interpolate(values[None, None], size=feature_size, mode="nearest")
    assert torch.equal(nearest_index(label_size, feature_size, torch.device("cpu")), expected[0, 0].long())


def test_nearest_rule_is_not_the_exact_quotient():
    assert nearest_index(720, 129, torch.device("cpu"))[43] == 239 != 43 * 720 // 129
