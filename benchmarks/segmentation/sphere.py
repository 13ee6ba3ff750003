"""Pictures of embeddings on the sphere: pixels of every class and the prototypes, before, during and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from torch import Tensor

from .data import Colour

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter

VIEW = {"elev": 22.0, "azim": 35.0}


class Sphere(NamedTuple):
    """What the pictures show."""

    prototypes: Tensor  #: (K, 3), of unit length
    frames: Tensor  #: (steps, pixels, 3): the embeddings of the same pixels at each step, of unit length
    labels: Tensor  #: (pixels,)
    own: list[float]  #: by step: mean cosine of a class's pixels with its prototype, mean over the classes
    hardest: list[float]  #: by step: largest cosine of another class's pixel with it, mean over the classes
    names: tuple[str, ...]
    colours: tuple[Colour, ...]


def _rgb(colours: tuple[Colour, ...]) -> np.ndarray:
    return np.array(colours, float) / 255


def _globe(axis: Any) -> None:
    """A net of thin lines, and no box around it."""
    angle = np.linspace(0, 2 * np.pi, 60)
    for polar in np.linspace(0, np.pi, 7)[1:-1]:
        ring = np.sin(polar) * np.cos(angle), np.sin(polar) * np.sin(angle), np.full_like(angle, np.cos(polar))
        axis.plot(*ring, color="0.85", linewidth=0.5)
    for turn in np.linspace(0, np.pi, 7)[:-1]:
        axis.plot(
            np.sin(angle) * np.cos(turn), np.sin(angle) * np.sin(turn), np.cos(angle), color="0.85", linewidth=0.5
        )
    axis.set_box_aspect((1, 1, 1), zoom=1.45)
    axis.set_axis_off()
    axis.view_init(**VIEW)


def _pixels(axis: Any, sphere: Sphere, frame: int) -> Any:
    colours = _rgb(sphere.colours)[sphere.labels.numpy()]
    return axis.scatter(*sphere.frames[frame].numpy().T, c=colours, s=7, depthshade=True, linewidths=0)


def _prototypes(axis: Any, sphere: Sphere) -> None:
    for k, place in enumerate(sphere.prototypes.numpy() * 1.02):
        axis.scatter(
            *place[:, None], color=_rgb(sphere.colours)[k], s=130, marker="o", edgecolors="black", linewidths=1.5
        )


def _legend(figure: Any, sphere: Sphere, **options: Any) -> None:
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", markersize=9, markeredgecolor="black", color=colour, label=name)
        for name, colour in zip(sphere.names, _rgb(sphere.colours), strict=True)
    ]
    figure.legend(handles=handles, frameon=False, **options)


def draw_sphere(sphere: Sphere, path: Path) -> None:
    """Before, after, and the cosines over the steps."""
    figure = plt.figure(figsize=(13, 4.6))
    grid = figure.add_gridspec(1, 3, width_ratios=(1, 1, 0.9), wspace=0.06, left=0.0, right=0.98, top=0.88, bottom=0.2)
    steps = len(sphere.frames) - 1
    for column, (frame, title) in enumerate(((0, "before"), (steps, f"after {steps} steps of ProAC"))):
        axis = figure.add_subplot(grid[column], projection="3d")
        _globe(axis)
        _pixels(axis, sphere, frame)
        _prototypes(axis, sphere)
        axis.set_title(title, fontsize=13)
    axis = figure.add_subplot(grid[2])
    axis.plot(sphere.own, color="C0", linewidth=2, label="a class's pixels with its prototype, mean")
    axis.plot(sphere.hardest, color="C3", linewidth=2, label="hardest pixel of another class with it")
    axis.set_title("cosines, mean over the classes", fontsize=13)
    axis.set_xlabel("step")
    axis.set_ylim(-0.1, 1.25)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9, loc="upper right", framealpha=0.8)
    _legend(figure, sphere, loc="lower center", ncols=len(sphere.names), fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def save_animation(sphere: Sphere, path: Path, frames: int = 36) -> None:
    """The pixels moving to their prototypes, slower at the start, where most happens; it ends on a rest."""
    steps = np.unique(((len(sphere.frames) - 1) * np.linspace(0, 1, frames) ** 2).round().astype(int))
    figure = plt.figure(figsize=(4.4, 4.6))
    axis = figure.add_axes((0, 0.1, 1, 0.84), projection="3d")
    _globe(axis)
    _prototypes(axis, sphere)
    points = _pixels(axis, sphere, 0)
    _legend(figure, sphere, loc="lower center", ncols=4, fontsize=8, handletextpad=0.1, columnspacing=0.8)

    def show(step: int) -> tuple[Any, ...]:
        points._offsets3d = tuple(sphere.frames[step].numpy().T)
        axis.set_title(f"step {step}", fontsize=12)
        return (points,)

    rest = [int(steps[-1])] * 8
    animation = FuncAnimation(figure, show, frames=[*map(int, steps), *rest], blit=False)
    animation.save(path, writer=PillowWriter(fps=8), dpi=72)
    plt.close(figure)
