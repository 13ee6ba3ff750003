"""Training: one function from a configuration and data to a result, the same for every loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from proac_cuda import ProACLoss

from .data import IGNORE_INDEX, Splits, batches
from .measure import LossMemory, Scores, evaluate, loss_memory, now, run_loss
from .network import SegmentationNetwork, upsample


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on besides its data."""

    proac_weight: float = 0.0  # lambda: total loss = cross-entropy + lambda * ProAC; 0 is cross-entropy alone
    temperature: float = 0.1
    embedding_dim: int = 128
    iterations: int = 350
    batch_size: int = 8
    crop: tuple[int, int] = (120, 160)  # height, width
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    seed: int = 0  # initial weights, order of the data, augmentation
    device: str = "cpu"


@dataclass(frozen=True)
class StepRecord:
    """One training step: the loss terms (ProAC before its weight) and seconds, without reading the data."""

    cross_entropy: float
    proac: float | None
    seconds: float
    cross_entropy_seconds: float
    proac_seconds: float | None


@dataclass
class TrainResult:
    """What a run leaves: the network, its scores, and what every step cost."""

    config: TrainConfig
    network: SegmentationNetwork
    validation: Scores
    test: Scores
    history: list[StepRecord]
    seconds: float  # of the whole run: set-up, training and evaluation
    memory: LossMemory | None  # of one forward and backward of ProAC on a training batch

    def typical(self, field: str) -> float | None:
        """Median over the steps of one of StepRecord's fields; the median passes over a disturbed step."""
        values = [getattr(record, field) for record in self.history]
        return None if None in values else median(values)

    def as_dict(self, class_names: tuple[str, ...]) -> dict[str, object]:
        """The result without the network, in plain lists and dictionaries; may hold NaN."""
        return {
            "config": asdict(self.config),
            "test": _scores_dict(self.test, class_names),
            "validation": _scores_dict(self.validation, class_names),
            "seconds": self.seconds,
            "step_seconds": self.typical("seconds"),
            "cross_entropy_seconds": self.typical("cross_entropy_seconds"),
            "proac_seconds": self.typical("proac_seconds"),
            "proac_memory_bytes": self.memory and asdict(self.memory),
            "history": [asdict(record) for record in self.history],
        }


def _scores_dict(scores: Scores, class_names: tuple[str, ...]) -> dict[str, object]:
    return {
        "mean_iou": scores.mean_iou,
        "accuracy": scores.accuracy,
        "iou": dict(zip(class_names, scores.iou.tolist(), strict=True)),
        "confusion": scores.confusion.tolist(),
    }


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at the labels' resolution, averaged over the pixels that are not ignored."""
    total = F.cross_entropy(upsample(logits, labels.shape[-2:]), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    # reduction="mean" would divide by zero on a batch of ignored pixels only.
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


def train(config: TrainConfig, data: Splits, on_step: Callable[[int, StepRecord], None] | None = None) -> TrainResult:
    """Train a network on data.train and score it on data.validation and data.test.

    Two configurations that differ in their loss alone start from the same weights and see the same batches.
    """
    start = now(config.device)
    num_classes = len(data.train.class_names)
    torch.manual_seed(config.seed)
    network = SegmentationNetwork(num_classes, config.embedding_dim).to(config.device)
    proac = None
    if config.proac_weight > 0:
        proac = ProACLoss(
            num_classes, config.embedding_dim, temperature=config.temperature, ignore_index=IGNORE_INDEX
        ).to(config.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.iterations, pct_start=0.1
    )
    history: list[StepRecord] = []
    source = batches(data.train, config.batch_size, config.crop, config.seed)
    for step in range(config.iterations):
        images, labels = (tensor.to(config.device) for tensor in next(source))
        network.train()
        optimizer.zero_grad()
        record = training_step(network, proac, config, images, labels, optimizer)
        schedule.step()
        history.append(record)
        if on_step:
            on_step(step, record)
    validation, test = (evaluate(network, part, config.device) for part in (data.validation, data.test))
    memory = None
    if proac is not None:  # looked at on the last batch, after training: watching every step would slow them
        with torch.no_grad():
            _, features = network(images)
        memory = loss_memory(lambda x: proac(x, labels), features)
    return TrainResult(config, network, validation, test, history, now(config.device) - start, memory)


def training_step(
    network: SegmentationNetwork,
    proac: ProACLoss | None,
    config: TrainConfig,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
) -> StepRecord:
    """Forward, losses, backward and update on one batch; each loss is timed by itself (see run_loss)."""
    start = now(config.device)
    logits, features = network(images, embed=proac is not None)
    ce = run_loss(lambda x: cross_entropy(x, labels), logits)
    outputs, gradients = [logits], [ce.gradient]
    contrast = None
    if proac is not None:
        contrast = run_loss(lambda x: proac(x, labels), features)
        outputs.append(features)
        gradients.append(config.proac_weight * contrast.gradient)
    # One backward through the network, from all loss terms at once.
    torch.autograd.backward(outputs, gradients)
    optimizer.step()
    return StepRecord(
        cross_entropy=ce.value,
        proac=contrast.value if contrast else None,
        seconds=now(config.device) - start,
        cross_entropy_seconds=ce.seconds,
        proac_seconds=contrast.seconds if contrast else None,
    )
