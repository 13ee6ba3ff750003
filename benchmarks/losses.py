"""The contestants: every backend of proac_cuda, and what a user would pick instead, as loss(features, labels, prototypes)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import proac_cuda
from proac_cuda.backends import BACKENDS

from .problems import IGNORED, TEMPERATURE, Problem

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

ANCHORS = 1024  # of the sampled pixel contrast


def as_maps(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) features as (1, D, N), (B, D, *spatial) as (B, D, P), with their labels as (B, P)."""
    if features.ndim == 2:
        return features.t().unsqueeze(0), labels.unsqueeze(0)
    return features.flatten(2), labels.flatten(1)


def as_rows(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, D), labels (N,)."""
    return features.movedim(1, -1).reshape(-1, features.shape[1]), labels.flatten()


def literal_port(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    """The published loss as it is written: a loop over classes, boolean masks, host synchronisations, one class at a time."""
    if features.ndim == 4:
        labels = F.interpolate(labels.float().unsqueeze(1), features.shape[2:], mode="nearest").squeeze(1).long()
    pixels, labels = as_rows(features, labels)
    pixels = F.normalize(pixels, dim=1)
    losses = []
    for k in range(prototypes.shape[0]):
        own = labels == k
        if own.sum().item() == 0:
            continue
        anchor = F.normalize(prototypes[k : k + 1], dim=1).to(pixels.dtype)
        positives, negatives = pixels[own], pixels[~own & (labels != IGNORED)]
        positive_logits = torch.exp(anchor @ positives.t() / TEMPERATURE)
        negative_sum = torch.exp(anchor @ negatives.t() / TEMPERATURE).sum(1, keepdim=True)
        losses.append(-torch.log(positive_logits / (positive_logits + negative_sum)).mean())
    return torch.stack(losses).mean()


def lean_expression(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    """The same, factored by hand: norms divide the product, so that nothing else is of size pixels x channels."""
    x, labels = as_maps(features, labels)
    s = torch.matmul(F.normalize(prototypes, dim=1).to(x.dtype), x)
    s = s / (torch.linalg.vector_norm(x, dim=1, keepdim=True) * TEMPERATURE)
    classes = torch.arange(prototypes.shape[0], device=x.device)[:, None]
    kept = labels != IGNORED
    index = torch.where(kept, labels, 0)
    excluded = (labels[:, None] == classes) | ~kept[:, None]
    log_z = s.masked_fill(excluded, -torch.inf).logsumexp((0, 2))
    positive = s.gather(1, index[:, None]).squeeze(1)
    loss = F.softplus(log_z[index] - positive) * kept
    count = torch.zeros_like(log_z).index_add(0, index.flatten(), kept.flatten().to(log_z.dtype))
    return (loss / count.clamp(min=1)[index]).sum() / (count > 0).sum()


def plain_expression(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    """What one would write first: normalise the features, one product, the loss by pixel."""
    x, labels = as_rows(F.normalize(features, dim=1), labels)
    s = x @ F.normalize(prototypes, dim=1).to(x.dtype).t() / TEMPERATURE
    kept = labels != IGNORED
    index = torch.where(kept, labels, 0)
    own = F.one_hot(index, prototypes.shape[0]).bool()
    log_z = s.masked_fill(own | ~kept[:, None], -torch.inf).logsumexp(0)
    loss = F.softplus(log_z[index] - s.gather(1, index[:, None]).squeeze(1)) * kept
    count = (own & kept[:, None]).sum(0)
    return (loss / count.clamp(min=1)[index]).sum() / (count > 0).sum()


def cosine_cross_entropy(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    """Each pixel against all classes: cross-entropy over cosine logits."""
    x, labels = as_maps(features, labels)
    s = torch.matmul(F.normalize(prototypes, dim=1).to(x.dtype), x)
    s = s / (torch.linalg.vector_norm(x, dim=1, keepdim=True) * TEMPERATURE)
    return F.cross_entropy(s, labels, ignore_index=IGNORED)


def linear_cross_entropy(chunked: bool) -> Callable[[Problem], Loss]:
    """The same by PyTorch's own fused function (2.13 and newer): what a user has without a package. Chunks save memory."""

    def make(problem: Problem) -> Loss:
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None

        def loss(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
            x, labels = as_rows(F.normalize(features, dim=1), labels)
            classifier = (F.normalize(prototypes, dim=1) / TEMPERATURE).to(x.dtype)
            return F.linear_cross_entropy(x, classifier, labels, ignore_index=IGNORED, options=options)

        return loss

    return make


def sampled_pixel_contrast(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    """Pixels against pixels, after Wang et al., Exploring Cross-Image Pixel Contrast for Semantic Segmentation, ICCV 2021.

    At most ANCHORS pixels, equally many of each class in each image, each attracted to the others of its class and
    repelled by those of other classes, over all images of the batch. Which half of them the paper takes among wrongly
    predicted pixels changes what is learnt and not what is computed, so they are drawn at random; no memory bank.
    """
    x, labels = as_maps(features, labels)
    image = torch.arange(x.shape[0], device=x.device)[:, None]
    group = torch.where(labels == IGNORED, -1, image * prototypes.shape[0] + labels).flatten()
    order = torch.rand(group.shape, device=x.device).argsort()
    order = order[group[order].argsort(stable=True)]  # by group, in random order within each
    sorted_group = group[order]
    first = torch.searchsorted(sorted_group, sorted_group)
    groups = ((sorted_group >= 0) & (first == torch.arange(len(order), device=x.device))).sum()
    views = (ANCHORS // groups.clamp(min=1)).clamp(min=1)
    taken = (sorted_group >= 0) & (torch.arange(len(order), device=x.device) - first < views)
    chosen = order[taken][:ANCHORS]

    anchors = F.normalize(x.transpose(1, 2)[chosen // x.shape[2], chosen % x.shape[2]], dim=1)
    classes = labels.flatten()[chosen]
    s = anchors @ anchors.t() / TEMPERATURE
    same = classes[:, None] == classes
    positive = same & ~torch.eye(len(chosen), dtype=torch.bool, device=x.device)
    negative_sum = s.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
    loss = (F.softplus(negative_sum - s) * positive).sum(1) / positive.sum(1).clamp(min=1)
    return loss.sum() / positive.any(1).sum().clamp(min=1)


def _backend(name: str) -> Callable[[Problem], Loss]:
    def make(problem: Problem) -> Loss:
        def loss(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
            sampling = {} if problem.num_negatives is None else {"num_negatives": problem.num_negatives, "seed": 0}
            return proac_cuda.proac_loss(
                features,
                labels,
                prototypes,
                backend=name,
                temperature=TEMPERATURE,
                ignore_index=IGNORED,
                **sampling,
            )

        return loss

    return make


def _compiled(expression: Loss) -> Callable[[Problem], Loss]:
    def make(problem: Problem) -> Loss:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool would outlive the compilation
        torch._dynamo.reset()  # else the second shape would be compiled for all sizes, which is slower
        return torch.compile(expression, dynamic=False)

    return make


def _metric_learning(name: str) -> Callable[[Problem], Loss]:
    """A loss of pytorch-metric-learning, on the pixels that are not ignored."""

    def make(problem: Problem) -> Loss:
        from pytorch_metric_learning import losses

        if name == "ProxyAnchorLoss":
            module = losses.ProxyAnchorLoss(problem.classes, problem.channels)
        else:
            module = losses.SupConLoss(temperature=TEMPERATURE)

        def loss(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
            if name == "ProxyAnchorLoss":
                module.proxies = torch.nn.Parameter(prototypes, requires_grad=False)
            x, labels = as_rows(features, labels)
            kept = labels != IGNORED
            return module(x[kept], labels[kept])

        return loss

    return make


def _floor(problem: Problem) -> Loss:
    class ReadThenCopy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, features):
            ctx.save_for_backward(features)
            return features.sum()

        @staticmethod
        def backward(ctx, grad):
            return ctx.saved_tensors[0].clone()

    return lambda features, labels, prototypes: ReadThenCopy.apply(features)


@dataclass(frozen=True)
class Contestant:
    """Something to be measured. ``make(problem)`` gives its loss."""

    name: str
    what: str
    make: Callable[[Problem], Loss]
    is_proac: bool = False  #: computes the ProAC loss, and must agree with the reference
    backend: str = ""  #: of proac_cuda
    samples: bool = False  #: knows num_negatives
    synchronises: bool = False  #: with the host: it cannot be captured in a CUDA graph
    compiled: bool = False  #: by torch.compile: a first call takes seconds or minutes
    needs: str = ""  #: a package
    needs_function: str = ""  #: of torch.nn.functional
    matrices: int = 4  #: of pixels x (channels + classes), held at once; for the estimate that keeps to the memory cap
    square_matrices: int = 0  #: of pixels x pixels

    def why_not(self, problem: Problem, device: str) -> str | None:
        """Why it cannot run this problem on that device, or None."""
        if self.backend and (reason := BACKENDS[self.backend].why_not(torch.device(device))):
            return reason
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs.replace('_', '-')} is not installed"
        if self.needs_function and not hasattr(F, self.needs_function):
            return f"PyTorch {torch.__version__} has no torch.nn.functional.{self.needs_function}"
        if problem.num_negatives is not None and not self.samples:
            return "it has no sampled negatives"
        return None

    def estimated_bytes(self, problem: Problem) -> int:
        """About what a call holds at once; on the safe side by at most a few times."""
        size = max(problem.torch_dtype.itemsize, 4)
        rows = self.matrices * problem.pixels * (problem.channels + problem.classes)
        return size * (rows + self.square_matrices * problem.pixels**2)

    def work(self, problem: Problem) -> float:
        """What its time grows with, to foretell the time of a call from that of another one."""
        if self.square_matrices:
            return float(problem.pixels) ** 2
        if self.name == "port":
            return float(problem.pixels) * problem.channels * problem.classes
        return float(problem.pixels) * problem.channels * (problem.classes + 50)


def _of_backend(name: str, what: str) -> Contestant:
    return Contestant(name, what, _backend(name), is_proac=True, backend=name, samples=True, matrices=1)


FLOOR = "floor"
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        _of_backend("cpp", "proac_cuda, C++ kernels"),
        _of_backend("cuda", "proac_cuda, CUDA kernels"),
        _of_backend("triton", "proac_cuda, Triton kernels"),
        _of_backend("reference", "proac_cuda, plain PyTorch reference"),
        Contestant(
            "port", "published loss, literal eager port", lambda _: literal_port, is_proac=True, synchronises=True
        ),
        Contestant("eager", "ProAC, leanest vectorised eager", lambda _: lean_expression, is_proac=True),
        Contestant(
            "compiled",
            "ProAC, the leanest form under torch.compile",
            _compiled(lean_expression),
            is_proac=True,
            compiled=True,
        ),
        Contestant(
            "compiled plain",
            "ProAC as one would first write it, under torch.compile",
            _compiled(plain_expression),
            is_proac=True,
            compiled=True,
        ),
        Contestant("cosine CE", "pixel-anchored cross-entropy over cosines", lambda _: cosine_cross_entropy),
        Contestant(
            "linear CE",
            "the same by torch.nn.functional.linear_cross_entropy",
            linear_cross_entropy(chunked=False),
            needs_function="linear_cross_entropy",
        ),
        Contestant(
            "linear CE, chunked",
            "the same by torch.nn.functional.linear_cross_entropy, in chunks",
            linear_cross_entropy(chunked=True),
            needs_function="linear_cross_entropy",
        ),
        Contestant(
            "sampled contrast",
            f"pixel contrast of {ANCHORS} sampled anchors",
            lambda _: sampled_pixel_contrast,
            synchronises=True,
            matrices=2,
        ),
        Contestant(
            "ProxyAnchor",
            "pytorch-metric-learning, ProxyAnchorLoss",
            _metric_learning("ProxyAnchorLoss"),
            needs="pytorch_metric_learning",
            synchronises=True,
            matrices=8,
        ),
        Contestant(
            "SupCon",
            "pytorch-metric-learning, SupConLoss",
            _metric_learning("SupConLoss"),
            needs="pytorch_metric_learning",
            synchronises=True,
            square_matrices=10,
        ),
        Contestant(FLOOR, "floor: features.sum(), then features.clone()", _floor, samples=True, matrices=1),
    )
}
