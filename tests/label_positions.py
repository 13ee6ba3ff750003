"""What a backend reads of labels and weights for each feature, found from what its first stage says of the pixels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

DIGIT = 64  # classes; a label is a digit of the number of the pixel that it stands in
MODES = ("nearest", "nearest-exact")


def interpolated(values: Tensor, size: tuple[int, ...], mode: str) -> Tensor:
    """(B, *any size) at another size, by PyTorch; of the numbers there only those below 2^24 are exact in float32."""
    return interpolate(values.float()[:, None], size=size, mode=mode)[:, 0].to(values.dtype)


def assert_reads_as_interpolate(
    stages: Any, size: tuple[int, ...], label_size: tuple[int, ...], mode: str, device: str = "cpu"
) -> None:
    """Each pixel's label and weight are those which interpolate reads, by the class its similarity tells."""
    count = math.prod(label_size)
    number = torch.arange(2 * count).reshape(2, *label_size)
    angles = torch.arange(DIGIT, dtype=torch.float64) * (math.pi / DIGIT)  # whose cosines are all different
    prototypes = torch.stack([angles.cos(), angles.sin()], dim=1)
    features = torch.tensor([1.0, 0.0], dtype=torch.float64).reshape(1, 2, *(1 for _ in size)).expand(2, 2, *size)
    weight = number.double() + 1
    place = torch.zeros(2, *size, dtype=torch.int64)
    expected = interpolated(number, size, mode)
    unit = 1
    while unit < 2 * count:
        labels = number // unit % DIGIT
        tensors = (values.to(device) for values in (features.contiguous(), labels, weight, prototypes))
        statistics, similarity, _ = (
            values.cpu()
            for values in stages.class_statistics(*tensors, None, None, 1.0, -1, False, False, mode == MODES[1])
        )
        digit = (similarity.clamp(-1, 1).acos() * (DIGIT / math.pi)).round().long()
        place += unit * digit
        sums = torch.zeros(DIGIT, dtype=torch.float64)
        sums.index_add_(0, (expected // unit % DIGIT).flatten(), expected.flatten().double() + 1)
        assert torch.equal(statistics[1], sums), "the weights"
        unit *= DIGIT
    assert torch.equal(place, expected), "the labels"
