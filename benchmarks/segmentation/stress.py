"""Test images under changed resolution, illumination and masks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image
from torch import nn

from .data import SegmentationDataset
from .measure import Scores, confusion_matrix, predict

PATCH = 20  # pixels along the side of a masked patch
GREY = 128  # what fills it: the input's zero

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # image (H, W, 3) uint8 to another


def rescaled(factor: float) -> Change:
    """The image at another resolution: averaged down, or interpolated up."""

    def change(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = (round(factor * size) for size in image.shape[:2])
        method = Image.Resampling.BOX if factor < 1 else Image.Resampling.BICUBIC
        return np.asarray(Image.fromarray(image).resize((width, height), method))

    return change


def gamma(exponent: float) -> Change:
    """Intensities in [0, 1] to a power: above 1 darkens."""
    table = (255 * (np.arange(256) / 255) ** exponent).round().astype(np.uint8)
    return lambda image, rng: table[image]


def brightness(factor: float) -> Change:
    """Intensities times a factor, cut off at white."""
    table = (np.arange(256) * factor).round().clip(0, 255).astype(np.uint8)
    return lambda image, rng: table[image]


def masked(share: float) -> Change:
    """A share of the patches of a regular grid filled with grey; they still count in the score."""

    def change(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        rows, columns = (-(-size // PATCH) for size in image.shape[:2])
        hidden = np.zeros(rows * columns, bool)
        hidden[rng.permutation(hidden.size)[: round(share * hidden.size)]] = True
        mask = hidden.reshape(rows, columns).repeat(PATCH, 0).repeat(PATCH, 1)[: image.shape[0], : image.shape[1]]
        return np.where(mask[..., None], np.uint8(GREY), image)

    return change


CONDITIONS: dict[str, Change] = {
    "half resolution": rescaled(0.5),
    "double resolution": rescaled(2.0),
    "gamma 0.5": gamma(0.5),
    "gamma 2": gamma(2.0),
    "brightness 0.6": brightness(0.6),
    "brightness 1.4": brightness(1.4),
    "15 % of patches masked": masked(0.15),
    "30 % of patches masked": masked(0.30),
}


def stress_scores(network: nn.Module, dataset: SegmentationDataset, device: str = "cpu") -> dict[str, Scores]:
    """Scores at the labels' resolution under each of CONDITIONS; which patches are masked follows from the image's index."""
    num_classes = len(dataset.class_names)
    totals = {name: np.zeros((num_classes, num_classes), np.int64) for name in CONDITIONS}
    for index in range(len(dataset)):
        image, label = dataset[index]
        for name, change in CONDITIONS.items():
            changed = change(image, np.random.default_rng(index))
            prediction = predict(network, changed, device, size=label.shape)
            totals[name] += confusion_matrix(label, prediction, num_classes)
    return {name: Scores(total) for name, total in totals.items()}
