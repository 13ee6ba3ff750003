"""Measurements: the confusion matrix and its scores, and the time and memory of one loss."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..memory import peak_extra_bytes
from .data import IGNORE_INDEX, SegmentationDataset, to_tensor
from .network import upsample


@dataclass(frozen=True)
class Scores:
    """What a confusion matrix says: rows are the true classes, columns the predicted ones."""

    confusion: np.ndarray

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union of every class; NaN where a class is neither present nor predicted."""
        hit = np.diag(self.confusion).astype(float)
        union = self.confusion.sum(0) + self.confusion.sum(1) - hit
        iou = np.full(len(hit), np.nan)
        np.divide(hit, union, out=iou, where=union > 0)
        return iou

    @property
    def mean_iou(self) -> float:
        """Mean over the classes that have an IoU."""
        return float(np.nanmean(self.iou)) if np.isfinite(self.iou).any() else float("nan")

    @property
    def accuracy(self) -> float:
        """Share of the pixels that are right."""
        return float(np.trace(self.confusion) / max(1, self.confusion.sum()))

    def as_dict(self, class_names: tuple[str, ...]) -> dict[str, object]:
        """Plain lists and dictionaries; may hold NaN."""
        return {
            "mean_iou": self.mean_iou,
            "accuracy": self.accuracy,
            "iou": dict(zip(class_names, self.iou.tolist(), strict=True)),
            "confusion": self.confusion.tolist(),
        }


def confusion_matrix(label: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts (true class, predicted class) over the pixels that are not ignored."""
    kept = label != IGNORE_INDEX
    pairs = label[kept].astype(np.int64) * num_classes + prediction[kept]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


@torch.no_grad()
def predict(
    network: nn.Module, image: np.ndarray, device: str = "cpu", size: tuple[int, int] | None = None
) -> np.ndarray:
    """The predicted class of every pixel of one image, (H, W) uint8, or at another `size` (height, width)."""
    network.eval()
    logits, _ = network(to_tensor(image)[None].to(device), embed=False)
    return upsample(logits, size or image.shape[:2]).argmax(1)[0].to(torch.uint8).cpu().numpy()


def evaluate(network: nn.Module, dataset: SegmentationDataset, device: str = "cpu") -> Scores:
    """Scores over all pixels of a data set, at full resolution, image by image (their sizes may differ)."""
    num_classes = len(dataset.class_names)
    total = np.zeros((num_classes, num_classes), np.int64)
    for index in range(len(dataset)):
        image, label = dataset[index]
        total += confusion_matrix(label, predict(network, image, device), num_classes)
    return Scores(total)


def now(device: str | torch.device) -> float:
    """The time in seconds, after the device has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class LossCall:
    """One evaluation of a loss: its value, the gradient for what it reads, and the seconds both took."""

    value: float
    gradient: Tensor
    seconds: float


def run_loss(loss: Callable[[Tensor], Tensor], source: Tensor) -> LossCall:
    """Forward and backward of one loss alone.

    The loss reads a detached leaf that shares the network output's memory, so its own backward ends there and can
    be timed by itself. The caller sends the gradient on into the network: by the chain rule, that
    gives the parameters the gradient of an ordinary `loss(source).backward()`, with no work done twice.
    """
    leaf = source.detach().requires_grad_()
    start = now(leaf.device)
    value = loss(leaf)
    value.backward()
    seconds = now(leaf.device) - start
    assert leaf.grad is not None
    return LossCall(value.item(), leaf.grad, seconds)


@dataclass(frozen=True)
class LossMemory:
    """Bytes that one forward and backward of a loss needs beyond its inputs."""

    peak: int  # the most held at once, the gradient included
    gradient: int  # for the features; every loss must return it


def loss_memory(loss: Callable[[Tensor], Tensor], source: Tensor) -> LossMemory:
    """Measure a loss on one input, in a call of its own: watching the allocator slows what it watches."""
    peak = peak_extra_bytes(lambda: run_loss(loss, source), str(source.device))
    return LossMemory(peak, source.numel() * source.element_size())
