"""Inputs of the comparison suite. Every shape stands there for a written reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Case:
    """One call: tensors on the CPU, in float64 where floating, and options."""

    reason: str
    features: tuple[int, ...]
    classes: int
    labels: tuple[int, ...] | None = None  #: spatial size; None: that of the features
    options: dict[str, Any] = field(default_factory=dict)
    weighted: bool = False
    absent: tuple[int, ...] = ()  #: classes without pixels
    ignored: int = 255  #: label of the tenth of the pixels that is ignored
    seed: int = 0

    def __str__(self) -> str:
        return self.reason.replace(" ", "-")

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """features, labels, prototypes and all options."""
        generator = torch.Generator().manual_seed(self.seed)
        features = torch.randn(self.features, generator=generator, dtype=torch.float64) * 3
        prototypes = torch.randn(self.classes, self.features[1], generator=generator, dtype=torch.float64)
        size = (self.features[0], *(self.features[2:] if self.labels is None else self.labels))
        labels = torch.randint(0, self.classes, size, generator=generator)
        for k in self.absent:
            labels[labels == k] = self.ignored
        labels[torch.rand(size, generator=generator) < 0.1] = self.ignored
        options = dict(self.options)
        if self.weighted:
            weight = torch.rand(size, generator=generator)
            options["pixel_weight"] = weight.masked_fill(weight < 0.1, 0)
            options["class_weight"] = torch.rand(self.classes, generator=generator)
        return features, labels, prototypes, options


CASES = [
    Case("one channel", (1, 1, 3, 5), 2),
    Case("channels below a vector", (2, 7, 5, 6), 3, labels=(11, 13)),
    Case("channels one past a vector", (1, 33, 4, 9), 5),
    Case("one pixel", (1, 16, 1, 1), 4),
    Case("pixels one short of a warp", (31, 24), 5),
    Case("a ragged tile", (1, 20, 7, 19), 19, labels=(14, 38)),
    Case("one class only", (1, 8, 4, 4), 1),
    Case("classes of ADE20K, many absent", (2, 32, 6, 5), 150),
    Case("classes beyond a register block", (1, 16, 5, 7), 37, absent=(0, 3, 36)),
    Case("rows of one spatial axis", (3, 12, 17), 6),
    Case("volumes", (2, 10, 3, 4, 5), 4, labels=(6, 3, 9)),
    Case("labels coarser than features", (1, 16, 9, 8), 5, labels=(3, 5)),
    Case("sizes where the exact quotient differs", (1, 4, 129, 1), 3, labels=(720, 1)),
    Case(
        "labels from the middles of cells",
        (2, 16, 6, 7),
        5,
        labels=(25, 9),
        options={"label_sampling": "nearest-exact", "pixel_anchor_weight": 0.3, "num_negatives": 9, "seed": 3},
        weighted=True,
    ),
    Case("pixel and class weights", (2, 16, 6, 7), 5, labels=(13, 9), weighted=True),
    Case("sampled negatives", (2, 16, 6, 7), 5, options={"num_negatives": 9, "seed": 5}),
    Case(
        "sampled, weighted, mean negatives, twin",
        (2, 16, 6, 7),
        5,
        labels=(12, 21),
        options={
            "num_negatives": 7,
            "seed": 2**63 + 12345,
            "negative_reduction": "mean",
            "pixel_anchor_weight": 0.3,
        },
        weighted=True,
    ),
    Case("more negatives asked for than there are", (50, 9), 4, options={"num_negatives": 1000, "seed": 1}),
    Case("mean negatives", (1, 16, 6, 7), 5, options={"negative_reduction": "mean"}),
    Case("pixel-anchored twin", (1, 16, 6, 7), 5, options={"pixel_anchor_weight": 1.5}, weighted=True),
    Case("sum over classes", (1, 16, 6, 7), 5, options={"reduction": "sum"}, weighted=True, absent=(2,)),
    Case("a value per class", (1, 16, 6, 7), 5, options={"reduction": "none"}, weighted=True, absent=(2,)),
    Case("cold", (1, 16, 6, 7), 5, options={"temperature": 1e-3, "pixel_anchor_weight": 0.5}),
    Case("cool enough to need a running maximum", (1, 16, 6, 7), 5, options={"temperature": 0.02}),
    Case("hot", (1, 16, 6, 7), 5, options={"temperature": 1e3, "pixel_anchor_weight": 0.5}),
    Case("an ignored class", (1, 16, 6, 7), 5, options={"ignore_index": 2}, ignored=2),
]

LAYOUTS = ["contiguous", "channels_last", "channel_slice", "batch_slice", "transposed_copy"]


def with_layout(features: Tensor, layout: str) -> Tensor:
    """The same values with other strides: all but the last pattern are read in place."""
    if layout == "contiguous" or features.ndim < 3:
        return features.contiguous()
    if layout == "channels_last":
        return features.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "channel_slice":
        padded = torch.cat([features, features.flip(1), features], 1)
        return padded[:, features.shape[1] * 2 :]
    if layout == "batch_slice":
        return torch.stack([features, features.flip(0)], 1).flatten(0, 1)[::2]
    assert layout == "transposed_copy"
    return features.transpose(-1, -2).contiguous().transpose(-1, -2)
