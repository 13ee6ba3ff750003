"""Pictures of a run: time and memory over pixels, and the kernels under their roof."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

from .losses import CONTESTANTS, FLOOR
from .results import Results, Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import NullFormatter  # noqa: E402

LABELS = {
    "cpp": "proac_cuda, C++",
    "cuda": "proac_cuda, CUDA",
    "triton": "proac_cuda, Triton",
    "reference": "proac_cuda, reference",
    "port": "ProAC as published (eager port)",
    "eager": "ProAC, lean eager",
    "compiled": "ProAC, torch.compile",
    "compiled plain": "ProAC, torch.compile, plain form",
    "cosine CE": "cosine cross-entropy",
    "linear CE": "linear_cross_entropy",
    "linear CE, chunked": "linear_cross_entropy, chunked",
    "sampled contrast": "1024 sampled anchors",
    "ProxyAnchor": "ProxyAnchorLoss",
    "SupCon": "SupConLoss",
    FLOOR: "floor: sum + clone",
}
OWN = ("cpp", "cuda", "triton")
COLOURS = {
    "cpp": "#c1121f",
    "cuda": "#c1121f",
    "triton": "#e36414",
    "reference": "#d4717a",
    "port": "#7b2cbf",
    "eager": "#6b4226",
    "compiled": "#1d70a2",
    "compiled plain": "#0b3954",
    "cosine CE": "#8a8d00",
    "linear CE": "#b5b833",
    "linear CE, chunked": "#6c757d",
    "sampled contrast": "#0096a6",
    "ProxyAnchor": "#4361ee",
    "SupCon": "#2d6a4f",
    FLOOR: "#555555",
}


def draw(results: Results, path: Path) -> None:
    """PNG files beside ``path``, for the sweeps that were measured."""
    rows = [row for row in results.rows if row["sweep"] == "pixels" and row["mode"] == "call"]
    if rows:
        title = f"D = {rows[0]['shape'][1]}, K = {rows[0]['classes']}, {rows[0]['dtype']}, forward + backward\n"
        for name, label, value in (
            ("time", "time of a call, ms", lambda row: row["both"]["median_ms"]),
            ("memory", "peak memory beyond the inputs, MiB", lambda row: (row.get("peak_extra_bytes") or 0) / 2**20),
        ):
            _over_pixels(rows, title + _machine(results), label, value, path.with_name(f"{path.stem}_{name}.png"))
    if any(row["contestant"] in OWN for row in results.rows):
        _roofline(results, path.with_name(f"{path.stem}_roofline.png"))


def _machine(results: Results) -> str:
    if "gpu" in results.machine:
        return results.machine["gpu"]["name"]
    threads = results.machine["threads"]
    return f"{results.machine['cpu']}, {threads} thread{'s' * (threads > 1)}"


def _over_pixels(rows: list[Row], title: str, label: str, value: Callable[[Row], float], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 6))
    ends = []
    for name in CONTESTANTS:
        points = sorted((row["pixels"], value(row), row) for row in rows if row["contestant"] == name if value(row))
        if not points:
            continue
        x, y, _ = zip(*points, strict=True)
        style = {"linewidth": 3} if name in OWN else {"linewidth": 1.5}
        if name == FLOOR:
            style["linestyle"] = "--"
        axes.plot(x, y, marker="o", markersize=4, color=COLOURS[name], zorder=3 if name in OWN else 2, **style)
        if label.startswith("time"):
            spreads = [row["both"] for _, _, row in points]
            bounds = [[s[which] for s in spreads] for which in ("lower_ms", "upper_ms")]
            axes.fill_between(x, *bounds, color=COLOURS[name], alpha=0.2, linewidth=0)
        ends.append((x[-1], y[-1], name))
    axes.set(xscale="log", yscale="log", xlabel="pixels in the call", ylabel=label)
    axes.set_xscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    right = max(row["pixels"] for row in rows)
    _label_ends(axes, ends, right)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _label_ends(axes: plt.Axes, ends: list[tuple[float, float, str]], right: float) -> None:
    """Names beside the lines' ends, moved apart where they would overlap; lines that end early are named above."""
    low, high = np.log10(axes.get_ylim())
    gap = (high - low) * 0.042
    late = sorted((end for end in ends if end[0] == right), key=lambda end: end[1])
    heights = _apart([np.log10(end[1]) for end in late], gap)
    for (x, y, name), height in zip(late, heights, strict=True):
        axes.annotate(
            LABELS[name],
            (x, y),
            (right * 1.35, 10**height),
            color=COLOURS[name],
            fontsize=9,
            va="center",
            fontweight="bold" if name in OWN else "normal",
            arrowprops={"arrowstyle": "-", "color": COLOURS[name], "linewidth": 0.5, "relpos": (0, 0.5)},
        )
    left = axes.get_xlim()[0]
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}  # other lines may pass there
    for end in sorted({x for x, _, _ in ends if x < right}):
        early = sorted((y, name) for x, y, name in ends if x == end)
        side, shift = ("right", 4) if end * end > left * right else ("left", -4)
        for number, (_, name) in enumerate(early):  # one above the other, over the highest
            style = {"textcoords": "offset points", "color": COLOURS[name], "fontsize": 9, "ha": side, "bbox": behind}
            axes.annotate(LABELS[name], (end, early[-1][0]), (shift, 7 + 14 * number), **style)


def _apart(heights: list[float], gap: float) -> list[float]:
    """Sorted heights, moved as little as makes them ``gap`` apart."""
    heights = list(heights)
    for _ in range(200):
        for i in range(len(heights) - 1):
            overlap = gap - (heights[i + 1] - heights[i])
            if overlap > 1e-6:
                heights[i] -= overlap / 2
                heights[i + 1] += overlap / 2
    return heights


def _roofline(results: Results, path: Path) -> None:
    """Flop/s over flop per byte of the own backends' rows, under the machine's bandwidth and products."""
    figure, axes = plt.subplots(figsize=(9, 6))
    own = [row for row in results.rows if row["contestant"] in OWN and row["mode"] == "call"]
    own = [row for row in own if row["dtype"] == "float32" and row["num_negatives"] is None]
    copy, rate = results.rates["copy"], results.rates["products"].get("float32")
    if not own or not rate:
        plt.close(figure)
        return
    x = np.logspace(-0.3, 3.2, 200)
    axes.plot(x, np.minimum(x * copy, rate) / 1e9, color="#333333", linewidth=1.5)
    beside = {"textcoords": "offset points", "fontsize": 9, "ha": "right"}
    ridge = (rate / copy, rate / 1e9)
    axes.annotate(f"float32 matrix products, {rate / 1e9:,.0f} GFLOP/s", ridge, (-8, -4), **beside)
    axes.annotate(f"copy bandwidth, {copy / 1e9:.1f} GB/s", (2, 2 * copy / 1e9), (-8, 4), **beside)
    for name in OWN:
        for sweep, marker in (("crops", "o"), ("classes", "s"), ("channels", "^")):
            rows = [row for row in own if (row["contestant"], row["sweep"]) == (name, sweep)]
            if rows:
                points = [_point(row) for row in rows]
                axes.scatter(
                    *zip(*points, strict=True),
                    marker=marker,
                    s=45,
                    color=COLOURS[name],
                    alpha=0.7,
                    label=f"{LABELS[name]}: {_range(rows)}",
                    zorder=3,
                )
    crops = [(*_point(row), row) for row in own if row["sweep"] == "crops"]
    axes.set(xscale="log", yscale="log", xlim=(0.1, x[-1] * 1.1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter(NullFormatter())
    _label_points(axes, sorted(crops, key=lambda point: point[0]))
    axes.set(xlabel="flop of the matrix products per byte of the least traffic", ylabel="GFLOP/s")
    axes.set_title(
        f"The kernels under their roof: forward + backward, float32\n{_machine(results)}", fontsize=10, loc="left"
    )
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.1), fontsize=9, frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _range(rows: list[Row]) -> str:
    """What the rows of a sweep have in common, and what differs."""

    def span(values: list[int]) -> str:
        return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"

    return f"K = {span([row['classes'] for row in rows])}, D = {span([row['shape'][1] for row in rows])}"


def _label_points(axes: plt.Axes, points: list[tuple[float, float, Row]]) -> None:
    """Names below and right of the points; those of neighbours (within a factor of three) are moved apart."""
    low, high = np.log10(axes.get_ylim())
    gap = (high - low) * 0.045
    while points:
        cluster = sorted((p for p in points if p[0] < 3 * points[0][0]), key=lambda point: point[1])
        points = [p for p in points if p[0] >= 3 * points[0][0]]
        right = max(point[0] for point in cluster)
        heights = _apart([np.log10(point[1]) - 2 * gap for point in cluster], gap)
        for (x, y, row), height in zip(cluster, heights, strict=True):
            axes.annotate(
                f"{row['name']}, K = {row['classes']}, D = {row['shape'][1]}",
                (x, y),
                (right * 1.3, 10**height),
                fontsize=8,
                va="center",
                color=COLOURS[row["contestant"]],
                arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "relpos": (0, 0.5)},
            )


def _point(row: Row) -> tuple[float, float]:
    """(flop per byte, GFLOP/s) by the model: effective bytes give the one, time the other."""
    done = 6 * row["pixels"] * row["classes"] * row["shape"][1]
    seconds = row["both"]["median_ms"] / 1e3
    moved = row["both"]["gb_per_second"] * 1e9 * seconds
    return done / moved, done / seconds / 1e9
