"""What the studies' pictures share: how they look, how they are written, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from .intervals import Estimate

matplotlib.use("Agg")  # draw into files; a machine without a display has no other backend
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
    "grid.color": "#e3e3e3", "legend.frameon": False, "savefig.dpi": 90,
}  # fmt: skip


def draw_all(pictures: Mapping[str, Callable[[], Figure]], folder: Path) -> None:
    """Write the pictures as PNG files of few colours, since they are kept beside the source."""
    for name, draw in pictures.items():
        with plt.rc_context(STYLE):
            figure = draw()
            figure.savefig(folder / name, bbox_inches="tight")
            plt.close(figure)
        with Image.open(folder / name) as image:  # of the methods, this one keeps the rare colours of thin lines
            few = image.convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(folder / name, optimize=True)


def difference_lines(
    found: Mapping[str, Sequence[Estimate]],
    rows: Sequence[str],
    xlabel: str,
    colours: Sequence[str] | None = None,
) -> Figure:
    """Differences with their 95 % intervals, a line of the picture for each of ``rows``, by what is compared."""
    figure, axis = plt.subplots(figsize=(7.5, 1.2 + 0.3 * len(rows) * max(1, len(found) / 2)), layout="constrained")
    step = 0.66 / len(found)
    for number, (label, gains) in enumerate(found.items()):
        places = np.arange(len(rows)) + step * (number - (len(found) - 1) / 2)
        widths = [gain.half_width if gain.count > 1 else 0.0 for gain in gains]
        axis.errorbar(
            [gain.mean for gain in gains], places, xerr=widths, label=label, color=colours[number] if colours else None,
            fmt="o", markersize=4, lw=1.4, capsize=2,
        )  # fmt: skip
    axis.axvline(0, color="#333333", lw=0.9)
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlabel(xlabel)
    figure.legend(ncols=3, loc="outside lower center")
    return figure
