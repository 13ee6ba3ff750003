"""The ratios that the CPU kernels are to keep to, out of the rows of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from .losses import FLOOR
from .results import Results, Row

KERNELS = "cpp"
CROPS = {"Cityscapes": "K = 19", "ADE20K": "K = 150", "large map": "large map"}


class Ratio(NamedTuple):
    """``limit`` is what is aimed at: at least, or at most."""

    text: str
    value: float
    limit: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def aim(self) -> str:
        return "" if self.limit is None else f"{'at least' if self.at_least else 'at most'} {self.limit:g}"


def milliseconds(row: Row, which: str = "both") -> float:
    return row[which]["median_ms"]


def ratios(results: Results) -> Iterator[Ratio]:
    """Those whose rows were measured; forward + backward unless said otherwise."""

    def quotient(text, above, below, limit=None, at_least=False) -> Iterator[Ratio]:
        rows = [results.find(*key) for key in (above, below)]
        if rows[0] and rows[1]:
            yield Ratio(text, milliseconds(rows[0]) / milliseconds(rows[1]), limit, at_least)

    for crop, port, plain in (("Cityscapes", 45, 8), ("ADE20K", 40, 3), ("large map", 40, 10)):
        kernels = ("crops", crop, KERNELS)
        yield from quotient(f"port / kernels, {CROPS[crop]}", ("crops", crop, "port"), kernels, port, True)
        above = ("crops", crop, "compiled plain")
        yield from quotient(f"compiled plain form / kernels, {CROPS[crop]}", above, kernels, plain, True)
        above = ("crops", crop, "compiled")
        yield from quotient(f"compiled, factored by hand / kernels, {CROPS[crop]}", above, kernels)
    kernels = ("crops", "Cityscapes", KERNELS)
    yield from quotient("kernels / floor, K = 19", kernels, ("crops", "Cityscapes", FLOOR), 1.1)
    row = results.find(*kernels)
    if row:
        share = milliseconds(row, "forward") / milliseconds(row)
        yield Ratio("forward / (forward + backward), K = 19", share, 0.5)
    above, below = ("dtypes", "bfloat16", KERNELS), ("dtypes", "float32", KERNELS)
    yield from quotient("bfloat16 / float32, K = 19", above, below, 0.77)
    above, below = ("layouts", "channels last", KERNELS), ("layouts", "contiguous", KERNELS)
    yield from quotient("channels_last / contiguous, K = 19", above, below, 1.3)
    above, below = (("negatives", f"K = 150, {which} negatives", KERNELS) for which in (4096, "all"))
    yield from quotient("4096 sampled negatives / all, K = 150", above, below, 1.0)
    per_pixel = [
        milliseconds(row) / row["pixels"]
        for row in results.rows
        if (row["sweep"], row["contestant"]) == ("pixels", KERNELS) and row["pixels"] >= 2**14
    ]
    if len(per_pixel) > 1:
        yield Ratio("slowest / fastest time per pixel, from 2^14 pixels on", max(per_pixel) / min(per_pixel), 2)
    row = results.find("crops", "ADE20K", KERNELS)
    if row:
        rate = 6 * row["pixels"] * row["classes"] * row["shape"][1] / milliseconds(row) * 1e3
        share = rate / results.rates["products"]["float32"]
        yield Ratio("share of the machine's float32 matrix-product rate, K = 150", share, 0.6, True)
    row = results.find("crops", "Cityscapes", KERNELS)
    if row and row.get("peak_extra_bytes"):
        extra = row["peak_extra_bytes"] / row["pixels"] - 4 * row["shape"][1]
        yield Ratio("bytes a pixel beyond inputs and gradient, K = 19", extra, 36)
    if "share" in results.training_step:
        share, limit = results.training_step["share"]["median"], results.training_step["limit"]
        yield Ratio("share of the loss in a training step of the demo", share, limit)


def show(results: Results, console: Console) -> None:
    """The ratios as a table, with what is aimed at on a CPU of two cores."""
    table = Table("ratio", "measured", "aimed at", "", title="Ratios")
    for ratio in ratios(results):
        verdict = {None: "", True: "met", False: "NOT MET"}[ratio.met]
        table.add_row(ratio.text, f"{ratio.value:.3g}", ratio.aim, verdict)
    if table.row_count:
        console.print(table)
