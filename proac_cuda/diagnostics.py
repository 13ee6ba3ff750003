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

_SHOWN = {
    "mean_positive_cosine": "mean cosine of a class's pixels with its prototype",
    "hardest_negative_cosine": "largest cosine of another class's pixel",
    "log_z": "log Z",
}


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
        """One panel for each quantity, one line for each class."""
        if not self.steps:
            raise ValueError("history: nothing was added yet")
        plt = _pyplot()
        figure, axes = plt.subplots(1, len(_SHOWN), figsize=(5 * len(_SHOWN), 4), constrained_layout=True)
        for axis, (quantity, title) in zip(axes, _SHOWN.items(), strict=True):
            table = self.values(quantity)
            names = _names(self.class_names, table.shape[1])
            colors = plt.get_cmap("tab20" if len(names) <= 20 else "viridis").resampled(len(names))
            for k, name in enumerate(names):
                axis.plot(self.steps, table[:, k], color=colors(k), label=name, linewidth=1.2)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
        if len(names) <= 20:
            axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(path, dpi=120)
        plt.close(figure)


def save_cosine_matrix(
    prototypes: Tensor, path: str | os.PathLike[str], class_names: Sequence[str] | None = None
) -> None:
    """Draw the cosines between all pairs of prototypes (K, D)."""
    unit = torch.nn.functional.normalize(prototypes.detach().double().cpu(), dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(torch.nan)
    names = _names(class_names, len(cosines))
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6, 5), constrained_layout=True)
    limit = float(cosines.nan_to_num(0).abs().max().clamp(min=1e-3))
    image = axis.imshow(cosines, cmap="RdBu_r", vmin=-limit, vmax=limit)
    if len(names) <= 30:
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_title("cosines between prototypes", fontsize=10)
    figure.colorbar(image)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    if class_names is None:
        return [str(k) for k in range(num_classes)]
    if len(class_names) != num_classes:
        raise ValueError(f"class_names: expected {num_classes}, one for each class, got {len(class_names)}")
    return list(class_names)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    return pyplot
