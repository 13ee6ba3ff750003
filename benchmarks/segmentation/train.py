"""Training: one function from a configuration and data to a result, the same for every loss, and resumable."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from proac_cuda import ProACLoss

from .adapt import Teacher, class_mix
from .data import IGNORE_INDEX, Batches, DataError, SegmentationDataset, Splits, check_labels
from .measure import LossCall, LossMemory, Scores, evaluate, loss_memory, now, run_loss
from .network import SegmentationNetwork, upsample


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on besides its data."""

    proac_weight: float = 0.0  # lambda: total loss = cross-entropy + lambda * ProAC; 0 is cross-entropy alone
    temperature: float = 0.1
    num_negatives: int | None = None  # None: all
    negative_reduction: str = "sum"  # or "mean"
    label_sampling: str = "nearest"  # how ProAC reads labels at the features' resolution; or "nearest-exact"
    anchors: str = "prototypes"  # "pixels": the pixel-anchored twin in ProAC's place
    prototypes: str = (
        "uniform"  # "random": directions drawn by the seed; "learnable": uniform at the start, then trained
    )
    head: str = "linear"  # between feature map and ProAC; "none" and "mlp" are the others
    embedding_dim: int = 128
    widths: tuple[int, ...] = (32, 64, 128, 192)  # channels of the network's stages
    pyramid_width: int = 96  # channels of its feature map
    backbone: str = "residual"  # the network's encoder; "lite0" is EfficientNet-Lite0, pretrained on ImageNet
    supervised: str = "cross_entropy"  # "focal": in its place; "dice": beside it, with the same weight
    class_weighted: bool = False  # cross-entropy with class weights by median frequency
    self_training: bool = False  # needs a target data set
    class_mix: bool = False  # half of a source image's classes are pasted into each target image
    confidence_weighted: bool = False  # pseudo labels weigh as much as the teacher is sure
    adapt_from: float = 1 / 3  # share of the iterations after which target images join
    keep_share: float = 0.5  # of the pixels of each predicted class; the others get no pseudo label
    teacher_momentum: float = 0.99
    iterations: int = 350
    batch_size: int = 8  # of source images, and as many of target images
    crop: tuple[int, int] = (120, 160)  # height, width
    enlarge: float = 1.0  # images are enlarged by up to so much before the crop
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    seed: int = 0  # initial weights, order of the data, augmentation
    probe_every: int = 0  # steps from one Training.probe to the next; 0: none
    device: str = "cpu"


@dataclass(frozen=True)
class StepRecord:
    """One training step: the loss terms (ProAC before its weight) and seconds, without reading the data."""

    cross_entropy: float
    proac: float | None
    seconds: float
    cross_entropy_seconds: float
    proac_seconds: float | None
    classes: int = 2  # with pixels in the batch; below two there is no contrast, and ProAC is 0
    pseudo_label_accuracy: float | None = None  # against the target's labels, which the training does not see
    probe: dict[str, float] | None = None  # of the network before the step, on its batch


@dataclass
class TrainResult:
    """What a run leaves: the network, its scores, and what every step cost."""

    config: TrainConfig
    network: SegmentationNetwork
    proac: ProACLoss | None
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
            "test": self.test.as_dict(class_names),
            "validation": self.validation.as_dict(class_names),
            "seconds": self.seconds,
            "step_seconds": self.typical("seconds"),
            "cross_entropy_seconds": self.typical("cross_entropy_seconds"),
            "proac_seconds": self.typical("proac_seconds"),
            "proac_memory_bytes": self.memory and asdict(self.memory),
            "history": [asdict(record) for record in self.history],
        }


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    focus: float = 0.0,
) -> Tensor:
    """Cross-entropy at the labels' resolution, averaged over the pixels that are not ignored, by their weights.

    With ``focus`` gamma > 0 the focal loss (Lin et al., ICCV 2017): each pixel's times (1 - p)^gamma, p being the probability
    of its class.
    """
    losses = F.cross_entropy(
        upsample(logits, labels.shape[-2:]), labels, class_weight, ignore_index=IGNORE_INDEX, reduction="none"
    )
    if focus > 0:
        losses = losses * (1 - torch.exp(-losses)) ** focus
    kept = (labels != IGNORE_INDEX).to(losses.dtype)
    if class_weight is not None:
        kept = kept * class_weight[labels.where(labels != IGNORE_INDEX, 0)]
    if pixel_weight is not None:
        losses, kept = losses * pixel_weight, kept * pixel_weight
    # reduction="mean" would divide by zero on a batch of ignored pixels only.
    return losses.sum() / kept.sum().clamp(min=1e-6)


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - 2 sum p t / (sum p + sum t) over a batch's pixels that are not ignored, averaged over the classes that it holds.

    Source: V-Net, Milletari et al., 3DV 2016, with sums in place of sums of squares.
    """
    probabilities = upsample(logits, labels.shape[-2:]).softmax(1).movedim(1, -1)
    kept = labels != IGNORE_INDEX
    p = probabilities[kept]  # (N, K)
    t = F.one_hot(labels[kept], p.shape[1]).to(p.dtype)
    present = t.sum(0) > 0
    dice = 2 * (p * t).sum(0) / (p.sum(0) + t.sum(0)).clamp(min=1e-6)
    return (1 - dice)[present].sum() / present.sum().clamp(min=1)


FOCUS = 2.0  # gamma of the focal loss, its authors'
SUPERVISED = ("cross_entropy", "focal", "dice")


def median_frequency_weights(dataset: SegmentationDataset) -> Tensor:
    """Class weights (K,): the median of the classes' frequencies over the class's own; 0 for a class without pixels."""
    counts = np.zeros(256, np.int64)
    for index in range(len(dataset)):
        counts += np.bincount(dataset[index][1].ravel(), minlength=256)
    counts = counts[: len(dataset.class_names)]
    weights = np.median(counts[counts > 0]) / counts.clip(min=1)
    return torch.tensor(np.where(counts > 0, weights, 0.0), dtype=torch.float32)


def make_proac(config: TrainConfig, num_classes: int, embedding_dim: int) -> ProACLoss:
    """The contrastive loss that a configuration asks for."""
    prototypes = None
    if config.prototypes == "random":
        prototypes = torch.randn(num_classes, embedding_dim, generator=torch.Generator().manual_seed(config.seed))
    elif config.prototypes not in ("uniform", "learnable"):
        raise ValueError(f"prototypes: {config.prototypes!r} is none of uniform, random, learnable")
    if config.anchors not in ("prototypes", "pixels"):
        raise ValueError(f"anchors: {config.anchors!r} is none of prototypes, pixels")
    twin = config.anchors == "pixels"
    return ProACLoss(
        num_classes,
        embedding_dim,
        prototypes=prototypes,
        learnable=config.prototypes == "learnable",
        temperature=config.temperature,
        num_negatives=config.num_negatives,
        negative_reduction=config.negative_reduction,
        label_sampling=config.label_sampling,
        ignore_index=IGNORE_INDEX,
        # Class weights concern the prototype-anchored part alone: with zeros there, the twin is all that is left.
        class_weight=torch.zeros(num_classes) if twin else None,
        pixel_anchor_weight=1.0 if twin else 0.0,
    )


class Training:
    """One run under way: everything that its further steps depend on, and the steps themselves."""

    def __init__(self, config: TrainConfig, data: Splits, target: SegmentationDataset | None = None):
        self.config, device = config, config.device
        num_classes = len(data.train.class_names)
        torch.manual_seed(config.seed)
        self.network = SegmentationNetwork(
            num_classes, config.embedding_dim, config.widths, config.pyramid_width, config.head, config.backbone
        ).to(device)
        if config.supervised not in SUPERVISED:
            raise ValueError(f"supervised: {config.supervised!r} is none of {', '.join(SUPERVISED)}")
        if config.supervised == "focal" and config.class_weighted:
            raise ValueError(
                "class_weighted goes with cross-entropy, not with the focal loss, which looks at probabilities"
            )
        self.proac = None
        parameters: list[dict[str, Any]] = [{"params": list(self.network.parameters())}]
        if config.proac_weight > 0:
            self.proac = make_proac(config, num_classes, self.network.embedding_dim).to(device)
            if learnable := list(self.proac.parameters()):
                parameters.append({"params": learnable, "weight_decay": 0.0})
        self.class_weight = median_frequency_weights(data.train).to(device) if config.class_weighted else None
        self.optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        warm_up = 0.1 if config.iterations != 10 else 0.2  # of one step, less one: OneCycleLR would divide by zero
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, config.learning_rate, total_steps=config.iterations, pct_start=warm_up
        )
        self.source = Batches(data.train, config.batch_size, config.crop, config.seed, config.enlarge)
        self.teacher = self.target = None
        if config.self_training:
            if target is None:
                raise ValueError("self_training needs a target data set")
            self.teacher = Teacher(self.network, config.teacher_momentum)
            self.target = Batches(target, config.batch_size, config.crop, config.seed + 1, config.enlarge)
        self.history: list[StepRecord] = []
        self.last_batch: tuple[Tensor, Tensor] | None = None

    def step(self) -> StepRecord:
        """Forward, losses, backward and update on one batch; each loss is timed by itself (see run_loss)."""
        config, device = self.config, self.config.device
        images, labels = (tensor.to(device) for tensor in next(self.source))
        adapting = self.target is not None and len(self.history) >= config.adapt_from * config.iterations
        start = now(device)
        weight, accuracy = None, None
        if adapting:
            images, labels, weight, accuracy = self._with_target(images, labels)
        self.network.train()
        probing = self.proac is not None and config.probe_every and len(self.history) % config.probe_every == 0
        probe = self.probe(images, labels, weight) if probing else None
        self.optimizer.zero_grad()
        logits, features = self._forward(images)
        ce = run_loss(lambda x: self._cross_entropy(x, labels, weight), logits)
        outputs, gradients = [logits], [ce.gradient]
        contrast: LossCall | None = None
        if self.proac is not None:
            proac = self.proac
            contrast = run_loss(lambda x: config.proac_weight * proac(x, labels, weight), features)
            outputs.append(features)
            gradients.append(contrast.gradient)
        # One backward through the network, from all loss terms at once.
        torch.autograd.backward(outputs, gradients)
        self.optimizer.step()
        if self.teacher is not None:
            self.teacher.update(self.network)
        self.last_batch = images, labels
        record = StepRecord(
            cross_entropy=ce.value,
            proac=contrast.value / config.proac_weight if contrast else None,
            seconds=now(device) - start,
            cross_entropy_seconds=ce.seconds,
            proac_seconds=contrast.seconds if contrast else None,
            classes=len(labels[labels != IGNORE_INDEX].unique()),
            pseudo_label_accuracy=accuracy,
            probe=probe,
        )
        self.schedule.step()
        self.history.append(record)
        return record

    def probe(self, images: Tensor, labels: Tensor, weight: Tensor | None = None) -> dict[str, float]:
        """How strong ProAC is beside cross-entropy on a batch, and how far it has come; what is trained stays as it is.

        Returns:
            "gradient_ratio": norm of lambda * ProAC's gradient over that of cross-entropy, at the feature map that both heads
            read. "own": cosine of a class's pixels with its prototype. "hardest": that of the other classes' closest pixel.
            Cosines are means over the classes that the batch holds.
        """
        assert self.proac is not None
        # Copies: a pass moves the statistics of batch normalisation, and a draw of negatives the random numbers.
        network, proac = copy.deepcopy((self.network.train(), self.proac))
        proac.return_stats = True
        size = self.config.batch_size
        with torch.no_grad():
            maps = [network.feature_map(images[part : part + size]) for part in range(0, len(images), size)]
        x = torch.cat(maps).requires_grad_()
        with torch.random.fork_rng():
            contrast, stats = proac(network.embedding(x), labels, weight)
        terms = self.config.proac_weight * contrast, self._cross_entropy(network.classifier(x), labels, weight)
        norms = [torch.autograd.grad(term, x)[0].norm() for term in terms]
        found = {
            "gradient_ratio": norms[0] / norms[1],
            "own": stats.mean_positive_cosine.nanmean(),
            "hardest": stats.hardest_negative_cosine.nanmean(),
        }
        return {name: value.item() for name, value in found.items()}

    def _with_target(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None, float]:
        """A batch with target images and their pseudo labels appended: images, labels, pixel weights, accuracy."""
        assert self.target is not None and self.teacher is not None
        target_images, truth = (tensor.to(self.config.device) for tensor in next(self.target))
        pseudo, confidence = self.teacher.label(target_images, self.config.keep_share)
        # Padding of small target images is no image: it has no label and gets none.
        pseudo = pseudo.masked_fill(truth == IGNORE_INDEX, IGNORE_INDEX)
        kept = pseudo != IGNORE_INDEX
        accuracy = float((pseudo == truth)[kept].float().mean()) if kept.any() else 0.0
        if self.config.class_mix:
            target_images, pseudo, pasted = class_mix(images, labels, target_images, pseudo)
            confidence = confidence.masked_fill(pasted, 1.0)
        weight = None
        if self.config.confidence_weighted:
            weight = torch.cat([torch.ones_like(confidence[:1]).expand(len(labels), -1, -1), confidence])
        return torch.cat([images, target_images]), torch.cat([labels, pseudo]), weight, accuracy

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits and embeddings; the domains pass one after the other, each with its own batch statistics."""
        embed, size = self.proac is not None, self.config.batch_size
        parts = [self.network(images[part : part + size], embed) for part in range(0, len(images), size)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([logits for logits, _ in parts]), torch.cat([x for _, x in parts]) if embed else None

    def _cross_entropy(self, logits: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
        """Cross-entropy of the source images, plus that of the target images where there are any."""
        total = 0.0
        for part in range(0, len(labels), self.config.batch_size):
            window = slice(part, part + self.config.batch_size)
            part_weight = None if weight is None else weight[window]
            focus = FOCUS if self.config.supervised == "focal" else 0.0
            total = total + cross_entropy(logits[window], labels[window], part_weight, self.class_weight, focus)
            if self.config.supervised == "dice":
                total = total + dice_loss(logits[window], labels[window])
        assert isinstance(total, Tensor)
        return total

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values alone, so that a checkpoint can be read without running code."""
        parts = {"network": self.network, "proac": self.proac, "optimizer": self.optimizer, "schedule": self.schedule}
        parts |= {"source": self.source, "target": self.target, "teacher": self.teacher}
        return {
            "config": plain(self.config),
            **{name: part and part.state_dict() for name, part in parts.items()},
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.config.device) if "cuda" in self.config.device else None,
            "history": [asdict(record) for record in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict() was taken."""
        if state["config"] != plain(self.config):
            raise ValueError("the checkpoint is of another configuration")
        parts = {"network": self.network, "proac": self.proac, "optimizer": self.optimizer, "schedule": self.schedule}
        parts |= {"source": self.source, "target": self.target, "teacher": self.teacher}
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.config.device)
        self.history = [StepRecord(**record) for record in state["history"]]


def plain(config: TrainConfig) -> dict[str, Any]:
    """A configuration as it reads back from JSON."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def save_checkpoint(training: Training, path: Path) -> None:
    """Write a checkpoint; one that is cut short never takes the place of a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(training.state_dict(), partial)
    os.replace(partial, path)


def load_checkpoint(training: Training, path: Path) -> None:
    """Read what save_checkpoint wrote."""
    try:
        training.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"{path} cannot be resumed: {error}; remove it to start over") from error


def train(
    config: TrainConfig,
    data: Splits,
    on_step: Callable[[int, StepRecord], None] | None = None,
    *,
    target: SegmentationDataset | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
) -> TrainResult:
    """Train a network on data.train and score it on data.validation and data.test.

    Two configurations that differ in their loss alone start from the same weights and see the same batches. With
    `self_training`, images of `target` join. Where `checkpoint` exists the run goes on from there, to the same end as
    without interruption (bit for bit on a CPU with the same number of threads); it is rewritten every
    `checkpoint_every` steps and stays until the caller removes it.

    Raises:
        DataError: training pixels of one class or none, or no pixel to score. Batches of fewer than two classes warn.
    """
    start = now(config.device)
    check_labels(data)
    training = Training(config, data, target)
    if checkpoint is not None and checkpoint.exists():
        load_checkpoint(training, checkpoint)
    for step in range(len(training.history), config.iterations):
        record = training.step()
        if on_step:
            on_step(step, record)
        if checkpoint is not None and (step + 1) % checkpoint_every == 0:
            save_checkpoint(training, checkpoint)
    poor = sum(record.classes < 2 for record in training.history)
    if poor:
        warnings.warn(
            f"{poor} of {len(training.history)} batches had pixels of fewer than two classes, where ProAC is 0 and "
            f"cross-entropy teaches little; a larger crop than {config.crop} or batch than {config.batch_size} helps",
            stacklevel=2,
        )
    network, proac = training.network, training.proac
    validation, test = (evaluate(network, part, config.device) for part in (data.validation, data.test))
    memory = None
    # Looked at on the last batch, after training: watching every step would slow them.
    if proac is not None and training.last_batch is not None:
        images, labels = training.last_batch
        with torch.no_grad():
            _, features = network(images)
        memory = loss_memory(lambda x: proac(x, labels), features)
    return TrainResult(config, network, proac, validation, test, training.history, now(config.device) - start, memory)
