"""Seeing what the loss sees of each class, what of the labels it does not see, and the prototypes' cosines.

Over training, as a picture or in TensorBoard.

Pictures need matplotlib (``pip install matplotlib``), TensorBoard its own package; neither is imported before it is used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .prototypes import prototype_certificate
from .stages.pixels import nearest_index
from .stages.validation import LABEL_DTYPES, as_int, check_label_sampling, check_tensor
from .statistics import ProACStats

_OWN, _HARDEST = "mean_positive_cosine", "hardest_negative_cosine"
_SHOWN = {
    _OWN: "mean cosine of a class's pixels with its prototype",
    _HARDEST: "largest cosine of another class's pixel with it",
    "log_z": "log Z",
}
_LABEL_SHARE = "share of a class's label pixels that features read"
_COLOURS = ("C3", "C1", "C0")  # of the classes that are drawn one by one
_LONG = 100  # steps after which a class that has no pixels, or positives that do not rise, are worth a word
_RISE, _LOW = 0.02, 0.3  # positives that rise by less, and end below, have not risen
_COLLAPSED = 0.9  # cosine of two prototypes
_NAMED = 40  # classes that have room for their names
_POINTS = 400  # of a curve: more than that are not to be seen, and take long to draw


class LabelsRead(NamedTuple):
    """Label pixels of each class, and how many of those the features read: int64 (K,) each. Counts of batches add up."""

    labels: Tensor  #: at the labels' own size
    read: Tensor  #: of those, the ones that some feature reads

    @property
    def share(self) -> Tensor:
        """read / labels, float32 (K,): about 1 / s^2 at stride s, 0 for a class that is lost, NaN for one without labels."""
        return self.read / self.labels


def labels_read(
    labels: Tensor,
    size: Sequence[int],
    num_classes: int,
    *,
    ignore_index: int = 255,
    label_sampling: str = "nearest",
) -> LabelsRead:
    r"""Count what the loss sees of the labels: one pass over them, without synchronisation.

    Args:
        labels: (B, \*any size), as :func:`~proac_cuda.proac_loss` takes them. Those outside [0, K) are not counted.
        size: spatial size of the features, ``features.shape[2:]``.
        num_classes: K.
        ignore_index: not counted.
        label_sampling: the rule that the loss is called with.

    Raises:
        TypeError, ValueError: labels of another dtype, a size of other axes, an unknown rule.
    """
    check_tensor("labels", labels, LABEL_DTYPES)
    check_label_sampling(label_sampling)
    num_classes = as_int("num_classes", num_classes, 1)
    if labels.ndim != len(size) + 1:
        raise ValueError(
            f"size: expected {labels.ndim - 1} numbers, one for each spatial axis of labels {tuple(labels.shape)}, "
            f"got {tuple(size)}"
        )
    read, repeated = labels, torch.zeros((), dtype=torch.bool, device=labels.device)
    for axis, features in enumerate(size, start=1):
        index = nearest_index(labels.shape[axis], features, labels.device, label_sampling == "nearest-exact")
        read = read.index_select(axis, index)
        again = torch.cat([index[:1] < 0, index[1:] == index[:-1]])  # several features read one label pixel
        repeated = repeated[..., None] | again
    counts = [_count(part, num_classes) for part in (labels, torch.where(repeated, -1, read.long()))]
    if 0 <= ignore_index < num_classes:
        for count in counts:
            count[ignore_index] = 0
    return LabelsRead(*counts)


def _count(labels: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class, (K,); torch.bincount would make the host wait for a GPU."""
    place = labels.flatten().long().clamp(-1, num_classes).add_(1)
    counts = torch.zeros(num_classes + 2, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(0, place, counts.new_ones(1).expand_as(place))[1:-1]


def log_to_tensorboard(
    writer: Any,
    stats: ProACStats,
    step: int,
    class_names: Sequence[str] | None = None,
    labels_read: LabelsRead | None = None,
) -> None:
    """Write each class's cosines, log Z and loss as scalars ``proac/<quantity>/<class>``. Synchronises with the GPU.

    Args:
        writer: anything with TensorBoard's ``add_scalar(tag, value, step)``.
        stats: of ``proac_loss(..., return_stats=True)``. Classes that are absent are left out.
        step: the training step.
        class_names: K names; their numbers by default.
        labels_read: of :func:`labels_read`; its shares are written too, as ``label_share``.
    """
    names = _names(class_names, len(stats.weight))
    if labels_read is not None:
        for name, share in zip(names, labels_read.share.tolist(), strict=True):
            if share == share:
                writer.add_scalar(f"proac/label_share/{name}", share, step)
    present = (stats.weight > 0).tolist()
    for quantity in (*_SHOWN, "loss"):
        values = getattr(stats, quantity).tolist()
        for name, value, is_present in zip(names, values, present, strict=True):
            if is_present and value == value and abs(value) != float("inf"):
                writer.add_scalar(f"proac/{quantity}/{name}", value, step)


class History:
    """What the loss saw of each class over training.

    Example::

        history = History(class_names)
        loss, stats = proac_loss(features, labels, prototypes, return_stats=True)
        history.add(step, stats)           # no synchronisation: the numbers stay on the device until they are drawn
        history.save_picture("proac.png")
    """

    def __init__(self, class_names: Sequence[str] | None = None) -> None:
        self.class_names = class_names
        self.steps: list[int] = []
        self._stats: list[ProACStats] = []
        self._shares: list[Tensor | None] = []

    def add(self, step: int, stats: ProACStats, labels_read: LabelsRead | None = None) -> None:
        """Keep the statistics of a step, and what :func:`labels_read` counted in it."""
        self.steps.append(step)
        self._stats.append(stats)
        self._shares.append(None if labels_read is None else labels_read.share)

    def values(self, quantity: str) -> Tensor:
        """(steps, K) of one field of :class:`ProACStats`, or "label_share"; NaN where the class was absent."""
        if not self._stats:
            return torch.empty(0, 0)
        if quantity == "label_share":
            nothing = torch.full_like(self._stats[0].weight, torch.nan, dtype=torch.float32)
            return torch.stack([nothing if share is None else share for share in self._shares]).cpu()
        table = torch.stack([getattr(stats, quantity) for stats in self._stats])
        present = torch.stack([stats.weight for stats in self._stats]) > 0
        return torch.where(present, table, torch.nan).cpu()

    def hints(self, prototypes: Tensor | None = None) -> list[str]:
        """What looks wrong, a sentence each: nothing where all is well. Synchronises with the GPU.

        Over 100 steps and more: classes without a pixel in the last 100; positives that did not rise. With learnable
        ``prototypes`` (K, D): pairs that have come together.
        """
        found = []
        if len(self.steps) >= _LONG:
            weight = torch.stack([stats.weight for stats in self._stats[-_LONG:]]).cpu()
            names = _names(self.class_names, weight.shape[1])
            own = self.values(_OWN)
            quarter = len(own) // 4
            first, last = own[:quarter].nanmedian(0).values, own[-quarter:].nanmedian(0).values
            for k, name in enumerate(names):
                if not (weight[:, k] > 0).any():
                    found.append(
                        f"class {name}: no pixel in the last {_LONG} steps. Is it in the labels, and do the features read "
                        "it? diagnostics.labels_read counts both"
                    )
                elif last[k] - first[k] < _RISE and last[k] < _LOW:
                    found.append(
                        f"class {name}: the cosine of its pixels with its prototype has not risen ({first[k]:.2f}, then "
                        f"{last[k]:.2f}). Are the head's parameters in the optimizer, and is lambda above 0?"
                    )
        if prototypes is not None:
            unit = torch.nn.functional.normalize(prototypes.detach().double().cpu(), dim=1)
            cosines = (unit @ unit.T).triu(1)
            names = _names(self.class_names, len(unit))
            for i, j in torch.nonzero(cosines > _COLLAPSED).tolist():
                found.append(
                    f"prototypes of classes {names[i]} and {names[j]} have come together (cosine {cosines[i, j]:.2f}): train "
                    "them more slowly, or use fixed ones"
                )
        return found

    def save_picture(self, path: str | os.PathLike[str]) -> None:
        """The three classes that are told apart worst, each in one colour, and the median over all; below, every class.

        The first panel holds both cosines of a class: of its own pixels (solid) and of the hardest pixel of another class
        (dashed). Of more than 400 steps, successive ones are drawn as one point, their mean. Blank where a class is absent.
        """
        if not self.steps:
            raise ValueError("history: nothing was added yet")
        shown = dict(_SHOWN)
        if any(share is not None for share in self._shares):
            shown["label_share"] = _LABEL_SHARE
        plt = _pyplot()
        steps = _thinned(torch.tensor(self.steps, dtype=torch.float64))
        names = _drawn_names(self.class_names, len(self._stats[0].weight))
        legends = names if self.class_names else [f"class {name}" for name in names]
        tables = {}
        for quantity in shown:
            table = self.values(quantity).double()
            tables[quantity] = _thinned(table.masked_fill(~table.isfinite(), torch.nan))
        worst = _worst(tables[_OWN], tables[_HARDEST])

        height = 0.17 * min(max(len(names), 15), _NAMED) + 0.5
        figure = plt.figure(figsize=(5 * len(shown), 3.4 + height), constrained_layout=True)
        grid = figure.add_gridspec(2, len(shown), height_ratios=(3.4, height))
        cosines = figure.add_subplot(grid[0, :2])
        cosines.set_title(
            "cosines with the prototype: own pixels (solid), hardest of another class (dashed)", fontsize=11
        )
        _draw_lines(cosines, steps, tables[_OWN], legends, worst, "solid")
        cosines.legend(fontsize=8, framealpha=0.6)
        _draw_lines(cosines, steps, tables[_HARDEST], legends, worst, "dashed")
        for column, (quantity, title) in enumerate(shown.items()):
            if column >= 2:
                axis = figure.add_subplot(grid[0, column])
                axis.set_title(title, fontsize=11)
                _draw_lines(axis, steps, tables[quantity], legends, worst, "solid")
            axis = figure.add_subplot(grid[1, column])
            image = _draw_classes(axis, steps, tables[quantity], names)
            axis.set_xlabel("step")
            axis.set_title(f"{title}, every class", fontsize=9)
            figure.colorbar(image, ax=axis, pad=0.01)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _worst(own: Tensor, hardest: Tensor) -> list[int]:
    """The classes whose hardest negative lies furthest above their own pixels in the last quarter, three of them."""
    gap = (hardest - own)[len(own) * 3 // 4 :].nanmedian(0).values.nan_to_num(-torch.inf)
    return [k for k in gap.argsort(descending=True).tolist() if gap[k] > -torch.inf][: len(_COLOURS)]


def _draw_lines(axis: Any, steps: Tensor, table: Tensor, names: list[str], classes: list[int], style: str) -> None:
    """The median over the classes in grey, and some classes in their colours."""
    axis.plot(
        steps.numpy(), table.nanquantile(0.5, 1).numpy(), color="0.35", linewidth=2, linestyle=style, label="median"
    )
    for colour, k in zip(_COLOURS, classes, strict=False):
        there = ~table[:, k].isnan()
        axis.plot(
            steps[there].numpy(), table[there, k].numpy(), color=colour, linewidth=1.2, linestyle=style, label=names[k]
        )
    axis.grid(alpha=0.3)


def _thinned(table: Tensor) -> Tensor:
    """At most 400 rows: the means of successive ones, NaN left out."""
    return table if len(table) <= _POINTS else torch.stack([part.nanmean(0) for part in table.tensor_split(_POINTS)])


def _draw_classes(axis: Any, steps: Tensor, table: Tensor, names: list[str]) -> Any:
    middles = (steps[1:] + steps[:-1]) / 2 if len(steps) > 1 else steps + 0.5
    edges = torch.cat([2 * steps[:1] - middles[:1], middles, 2 * steps[-1:] - middles[-1:]])
    edges = edges[: len(steps) + 1]
    image = axis.pcolormesh(edges.numpy(), range(len(names) + 1), table.T.numpy(), rasterized=True)
    axis.set_facecolor("0.9")
    axis.invert_yaxis()
    if len(names) <= _NAMED:
        axis.set_yticks([k + 0.5 for k in range(len(names))], names, fontsize=8)
    else:
        axis.set_ylabel("class")
    return image


def save_cosine_matrix(
    prototypes: Tensor, path: str | os.PathLike[str], class_names: Sequence[str] | None = None
) -> None:
    """Draw the cosines between all pairs of prototypes (K, D)."""
    unit = torch.nn.functional.normalize(prototypes.detach().double().cpu(), dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(torch.nan)
    names = _drawn_names(class_names, len(cosines))
    plt = _pyplot()
    side = 0.17 * min(max(len(names), 20), _NAMED) + 1
    figure, axis = plt.subplots(figsize=(side + 2.2, side + 1.2), constrained_layout=True)
    limit = max(0.2, float(cosines.nan_to_num(0).abs().max()))
    image = axis.imshow(cosines.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.set_facecolor("0.6")
    if len(names) <= _NAMED:
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
    title = f"cosines of {len(names)} prototypes in {prototypes.shape[1]} dimensions"
    if len(names) > 1:
        certificate = prototype_certificate(prototypes)
        title += f"\nlargest {certificate.largest_cosine:.4f}, lower bound {certificate.lower_bound:.4f} ({certificate.bound})"
    axis.set_title(title, fontsize=10)
    figure.colorbar(image, shrink=0.8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    if class_names is None:
        return [str(k) for k in range(num_classes)]
    if len(class_names) != num_classes:
        raise ValueError(f"class_names: expected {num_classes}, one for each class, got {len(class_names)}")
    return list(class_names)


def _drawn_names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    """The names as matplotlib draws them: two dollar signs would begin and end a formula."""
    return [name.replace("$", r"\$") for name in _names(class_names, num_classes)]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    return pyplot
