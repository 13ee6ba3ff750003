"""Seeing what the loss sees of each class: over training, to a picture or TensorBoard; and the prototypes' cosines.

Pictures need matplotlib (``pip install matplotlib``), TensorBoard its own package; neither is imported before it is used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import ProACStats
from .prototypes import prototype_certificate

# Quantity: its title, and whether large values are the bad ones.
_SHOWN = {
    "mean_positive_cosine": ("mean cosine of a class's pixels with its prototype", False),
    "hardest_negative_cosine": ("largest cosine of another class's pixel with it", True),
    "log_z": ("log Z", True),
}
_NAMED = 40  # classes that have room for their names
_POINTS = 400  # of a curve: more than that are not to be seen, and take long to draw


def log_to_tensorboard(writer: Any, stats: ProACStats, step: int, class_names: Sequence[str] | None = None) -> None:
    """Write each class's cosines, log Z and loss as scalars ``proac/<quantity>/<class>``. Synchronises with the GPU.

    Args:
        writer: anything with TensorBoard's ``add_scalar(tag, value, step)``.
        stats: of ``proac_loss(..., return_stats=True)``. Classes that are absent are left out.
        step: the training step.
        class_names: K names; their numbers by default.
    """
    names = _names(class_names, len(stats.weight))
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

    def add(self, step: int, stats: ProACStats) -> None:
        """Keep the statistics of a step."""
        self.steps.append(step)
        self._stats.append(stats)

    def values(self, quantity: str) -> Tensor:
        """(steps, K) of one field of :class:`ProACStats`; NaN where the class was absent."""
        if not self._stats:
            return torch.empty(0, 0)
        table = torch.stack([getattr(stats, quantity) for stats in self._stats])
        present = torch.stack([stats.weight for stats in self._stats]) > 0
        return torch.where(present, table, torch.nan).cpu()

    def save_picture(self, path: str | os.PathLike[str]) -> None:
        """For each quantity, the median over the classes with the worst three; below it, all classes, blank where absent.

        Of more than 400 steps, successive ones are drawn as one point, their mean.
        """
        if not self.steps:
            raise ValueError("history: nothing was added yet")
        plt = _pyplot()
        steps = _thinned(torch.tensor(self.steps, dtype=torch.float64))
        names = _drawn_names(self.class_names, len(self._stats[0].weight))
        height = 0.17 * min(max(len(names), 15), _NAMED) + 0.5
        figure, axes = plt.subplots(
            2,
            len(_SHOWN),
            figsize=(15, 3.2 + height),
            height_ratios=(3.2, height),
            sharex="col",
            squeeze=False,
            constrained_layout=True,
        )
        for column, (quantity, (title, large_is_bad)) in enumerate(_SHOWN.items()):
            table = self.values(quantity).double()
            table = _thinned(table.masked_fill(~table.isfinite(), torch.nan))
            axes[0, column].set_title(title, fontsize=11)
            self._draw_summary(axes[0, column], steps, table, names, large_is_bad)
            image = _draw_classes(axes[1, column], steps, table, names)
            axes[1, column].set_xlabel("step")
            figure.colorbar(image, ax=axes[1, column], pad=0.01)
        figure.savefig(path, dpi=110)
        plt.close(figure)

    def _draw_summary(self, axis: Any, steps: Tensor, table: Tensor, names: list[str], large_is_bad: bool) -> None:
        low, middle, high = (table.nanquantile(q, 1).numpy() for q in (0.1, 0.5, 0.9))
        axis.fill_between(steps.numpy(), low, high, color="0.85", label="10 to 90 % of classes")
        axis.plot(steps.numpy(), middle, color="0.25", linewidth=2, label="median")
        recent = table[len(table) * 3 // 4 :].nanmedian(0).values
        badness = (recent if large_is_bad else -recent).nan_to_num(-torch.inf)
        for color, k in zip(("C3", "C1", "C0"), badness.argsort(descending=True).tolist(), strict=False):
            there = ~table[:, k].isnan()
            label = names[k] if self.class_names else f"class {k}"
            if there.any():
                axis.plot(steps[there].numpy(), table[there, k].numpy(), color=color, linewidth=1, label=label)
        axis.legend(fontsize=8, framealpha=0.6)
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
