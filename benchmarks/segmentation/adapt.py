"""Domain adaptation: pseudo labels from an averaged teacher, and the statistics of another domain."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .data import IGNORE_INDEX, Batches, SegmentationDataset
from .network import SegmentationNetwork, upsample


class Teacher:
    """A moving average of a network; it labels the images of the target domain."""

    def __init__(self, network: SegmentationNetwork, momentum: float):
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.momentum, self.updates = momentum, 0

    @torch.no_grad()
    def update(self, network: SegmentationNetwork) -> None:
        """One step of the average; over the first steps it is the plain mean, so it forgets the initial weights."""
        self.updates += 1
        momentum = min(self.momentum, 1 - 1 / self.updates)
        for mine, new in zip(self.network.state_dict().values(), network.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(new, 1 - momentum)
            else:  # batch normalisation counts its batches
                mine.copy_(new)

    @torch.no_grad()
    def label(self, images: Tensor, keep: float) -> tuple[Tensor, Tensor]:
        """Pseudo labels and their confidence, both (B, H, W) at the images' size.

        Of the pixels that are predicted to be of a class, the share `keep` with the highest confidence is kept; the
        others are ignored. A fixed threshold would drop the hard classes whole.
        """
        self.network.train()  # the statistics of this batch, not of the source images of the average
        logits, _ = self.network(images, embed=False)
        confidence, labels = upsample(logits, images.shape[-2:]).softmax(1).max(1)
        for k in labels.unique():
            members = labels == k
            labels[members & (confidence < confidence[members].quantile(1 - keep))] = IGNORE_INDEX
        return labels, confidence

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.updates = state["updates"]


def class_mix(source: Tensor, source_labels: Tensor, target: Tensor, pseudo: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Half of the classes of each source image, drawn anew, pasted into a target image with their labels.

    ClassMix, Olsson et al., WACV 2021, between domains as in DACS, Tranheden et al., WACV 2021.

    Returns:
        Images, labels, and (B, H, W) bool where the source was pasted.
    """
    picked = []
    for labels in source_labels:
        present = labels[labels != IGNORE_INDEX].unique()
        picked.append(torch.isin(labels, present[torch.randperm(len(present))[: (len(present) + 1) // 2]]))
    pasted = torch.stack(picked)
    return source.where(pasted[:, None], target), source_labels.where(pasted, pseudo), pasted


@torch.no_grad()
def with_statistics_of(
    network: SegmentationNetwork, dataset: SegmentationDataset, batch_size: int, crop: tuple[int, int], device: str
) -> SegmentationNetwork:
    """A copy whose batch normalisation has the mean statistics of batches of another data set; no label is looked at."""
    adapted = copy.deepcopy(network).train()
    for module in adapted.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over all batches
    batches = Batches(dataset, batch_size, crop, seed=0)
    for _ in range(-(-len(dataset) // batch_size)):
        adapted(next(batches)[0].to(device), embed=False)
    return adapted.eval()
