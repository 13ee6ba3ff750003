"""What a run says, as tables: on the terminal in full, and in Markdown for the documentation."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from .losses import CONTESTANTS
from .ratios import KERNELS, milliseconds, ratios
from .results import Results, Row

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "benchmarks" / "results" / "cpu.json"


def time(ms: float) -> str:
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def size(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**20:,.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**20:.2g} MiB"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def error(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def show(results: Results, console: Console) -> None:
    """All rows, then what was left out and why."""
    for sweep in dict.fromkeys(row["sweep"] for row in results.rows):
        table = Table(title=f"{sweep}: medians, and the quartiles of forward + backward", box=box.SIMPLE_HEAD)
        for title in ("problem", "contestant"):
            table.add_column(title, no_wrap=True)
        for title in ("forward", "backward", "both", "quartiles, ms", "runs", "memory", "Mpixel/s", "GB/s"):
            table.add_column(title, justify="right", no_wrap=True)
        for title in ("of copy", "of roof", "loss error", "gradient error"):
            table.add_column(title, justify="right")
        before = None
        for row in (row for row in results.rows if row["sweep"] == sweep):
            if before not in (None, row["name"]):
                table.add_section()
            both = row["both"]
            table.add_row(
                "" if before == row["name"] else row["name"],
                row["contestant"] + ("" if row["mode"] == "call" else ", graph"),
                *(time(milliseconds(row, which)) for which in ("forward", "backward", "both")),
                f"{both['lower_ms']:.3g} to {both['upper_ms']:.3g}",
                str(both["runs"]),
                size(row.get("peak_extra_bytes")),
                f"{both['pixels_per_second'] / 1e6:.3g}",
                f"{both['gb_per_second']:.3g}",
                share(both["share_of_copy"]),
                share(both["share_of_roof"]),
                error(row["loss_error"]),
                error(row["gradient_error"]),
            )
            before = row["name"]
        console.print(table)
    for line in left_out(results):
        console.print(line)
    for line in (*exchanged(results), *step(results)):
        console.print(line)


def left_out(results: Results) -> Iterator[str]:
    """A line for each contestant and reason, numbers in reasons aside."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for entry in results.left_out:
        grouped.setdefault((entry["contestant"], entry["reason"]), []).append(f"{entry['sweep']}: {entry['name']}")
    for (contestant, reason), places in grouped.items():
        where = places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"
        yield f"left out: {contestant} ({where}): {reason}"


def exchanged(results: Results) -> Iterator[str]:
    for row in results.exchange:
        yield (
            f"{row['setting']}, {row['pass']}: {row['bytes_contributed']:,} bytes from each of {row['ranks']} ranks in "
            f"{row['collectives']} collectives, K = {row['classes']}; its features are {row['bytes_of_features']:,} bytes"
        )


def step(results: Results) -> Iterator[str]:
    found = results.training_step
    if "reason" in found:
        yield f"left out: training step: {found['reason']}"
    elif found:
        yield (
            f"training step of the demo: {found['step_ms']['median']:.0f} ms, of which the loss takes "
            f"{found['proac_ms']['median']:.1f} ms, {100 * found['share']['median']:.1f} %"
        )


def markdown(results: Results) -> str:
    """The documentation's part, from its first to its last line."""
    parts = (_origin(results), _crops(results), _kernels(results), _ratios(results), _words(results))
    return "\n\n".join(filter(None, parts))


def _origin(results: Results) -> str:
    m, method = results.machine, results.method
    isa = "AMX, " if "amx_tile" in m["cpu_flags"] else ""
    isa += "AVX-512" if "avx512f" in m["cpu_flags"] else "AVX2" if "avx2" in m["cpu_flags"] else "no AVX2"
    threads = f"{m['threads']} thread{'s' * (m['threads'] > 1)}"
    clock = ", in time of the process itself" if method["clock"] == "process" else ""
    return _wrapped(
        f"Measured {m['date'][:10]} at commit {m['commit'][:10]}{' with changes' if 'changed' in m['commit'] else ''} by "
        f"`{method['command']}` on {m['cpu']} ({isa}), {m['cores']} cores, {threads}, torch {m['torch']}, load average "
        f"{m['load_average']:.1f} at the start. The machine copies {results.rates['copy'] / 1e9:.1f} GB/s (read + written) and "
        f"multiplies float32 matrices at {results.rates['products']['float32'] / 1e9:,.0f} GFLOP/s. Medians of alternating "
        f"calls on inputs that rotate through {method['rotated_bytes'] / 2**20:,.0f} MiB{clock}; memory is the allocator's "
        "peak beyond the inputs, the gradient included."
    )


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 128, break_long_words=False, break_on_hyphens=False))


def _crops(results: Results) -> str:
    rows = [row for row in results.rows if row["sweep"] == "crops" and row["mode"] == "call"]
    problems = {row["name"]: row for row in rows}
    heads = (f"{name} {tuple(row['shape'])}, K = {row['classes']}" for name, row in problems.items())
    lines = [f"| forward + backward, peak memory | {' | '.join(heads)} |", "|---" * (1 + len(problems)) + "|"]
    absent = []
    for name, contestant in CONTESTANTS.items():
        cells = []
        for problem in problems:
            row = results.find("crops", problem, name)
            cells.append(f"{time(milliseconds(row))}, {size(row.get('peak_extra_bytes'))}" if row else "-")
        if set(cells) != {"-"}:
            lines.append(f"| {contestant.what} | {' | '.join(cells)} |")
        entries = [e for e in results.left_out if (e["sweep"], e["contestant"]) == ("crops", name)]
        if entries:
            where = entries[0]["name"] if len(entries) < len(problems) else "every crop"
            absent.append(f"{contestant.what} on {where} ({entries[0]['reason']})")
    text = "\n".join(lines)
    if absent:
        text += "\n\n" + _wrapped(f"Not measured: {'; '.join(absent)}.")
    return text + _largest(results)


def _largest(results: Results) -> str:
    """The largest size of the pixel sweep for those that a crop is too large for."""
    sentences = []
    for name in ("ProxyAnchor", "SupCon"):
        rows = [row for row in results.rows if (row["sweep"], row["contestant"]) == ("pixels", name)]
        if rows:
            row = max(rows, key=lambda row: row["pixels"])
            sentences.append(
                f"{CONTESTANTS[name].what} at {row['pixels']:,} pixels: {time(milliseconds(row))}, "
                f"{size(row.get('peak_extra_bytes'))}"
            )
    if not sentences:
        return ""
    cap = results.method["memory_cap_bytes"] / 2**30
    return "\n\n" + _wrapped(f"The largest that fits {cap:g} GiB, D = 32, K = 19: {'; '.join(sentences)}.")


def _kernels(results: Results) -> str:
    rows = [row for row in results.rows if (row["sweep"], row["contestant"]) == ("crops", KERNELS)]
    if not rows:
        return ""
    lines = [
        "| kernels | forward | backward | Mpixel/s | GB/s | of copy bandwidth | of the roof | error of loss, gradient |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        both = row["both"]
        times = (_with_spread(row[which]) for which in ("forward", "backward"))
        lines.append(
            f"| {row['name']} | {' | '.join(times)} | {both['pixels_per_second'] / 1e6:.2f} | "
            f"{both['gb_per_second']:.1f} | {share(both['share_of_copy'])} | {share(both['share_of_roof'])} | "
            f"{error(row['loss_error'])}, {error(row['gradient_error'])} |"
        )
    return "\n".join(lines)


def _with_spread(spread: Row) -> str:
    return f"{spread['median_ms']:.3g} ms ({spread['lower_ms']:.3g} to {spread['upper_ms']:.3g})"


def _ratios(results: Results) -> str:
    lines = ["| ratio | measured | aimed at |", "|---|---|---|"]
    lines += [f"| {r.text} | {r.value:.3g} | {r.aim}{', not met' if r.met is False else ''} |" for r in ratios(results)]
    return "\n".join(lines) if len(lines) > 2 else ""


def _words(results: Results) -> str:
    """Sampling in words, the ranks' exchange, the training step."""
    sentences = [*sampling(results)]
    for row in results.exchange:
        if row["pass"] == "forward":
            sentences.append(
                f"With `process_group=` and {row['setting']}, K = {row['classes']}, each rank contributes "
                f"{row['bytes_contributed']:,} bytes to {row['collectives']} collectives in forward."
            )
    if any(row["pass"] == "backward" for row in results.exchange):
        total = sum(row["bytes_contributed"] for row in results.exchange if row["pass"] == "backward")
        sentences.append(f"Backward exchanges {total or 'no'} bytes.")
    sentences += [f"The {text[0].lower()}{text[1:]}." for text in step(results)]
    return _wrapped(" ".join(sentences))


def sampling(results: Results) -> Iterator[str]:
    """Where drawing negatives saves time, by number of classes."""
    rows = [row for row in results.rows if (row["sweep"], row["contestant"]) == ("negatives", KERNELS)]
    for classes in dict.fromkeys(row["classes"] for row in rows):
        times = {row["num_negatives"]: milliseconds(row) for row in rows if row["classes"] == classes}
        if None not in times or len(times) < 2:
            continue
        relative = {count: ms / times[None] for count, ms in times.items() if count is not None}
        listed = ", ".join(f"{count}: {value:.2f}" for count, value in relative.items())
        saving = [count for count, value in relative.items() if value < 0.95]
        if saving:
            verdict = f"sampling saves time up to {max(saving)} negatives"
        else:
            verdict = "sampling saves nothing: every feature is still read twice, and its gradient written"
        yield f"At K = {classes} {verdict} (time by number of negatives, over that of all: {listed})."


def figures(results: Results) -> str:
    """The README's three figures: time, memory and exactness at the first crop."""
    m, first = results.machine, results.rows and next((row for row in results.rows if row["sweep"] == "crops"), None)
    if not first:
        return ""
    rows = {
        name: results.find("crops", first["name"], name) for name in (KERNELS, "port", "compiled", "compiled plain")
    }
    ours, port, lean, plain = rows.values()
    if not (ours and port and lean and plain):
        return ""
    ms = milliseconds(ours)
    pixels = f"{first['pixels']:,} pixels, D = {first['shape'][1]}, K = {first['classes']}"
    return "\n".join(
        (
            f"| forward + backward, {pixels}; {m['cpu']}, {m['threads']} threads | |",
            "|---|---|",
            f"| **time** | {time(ms)}; the published loss takes {milliseconds(port) / ms:.0f} times as long, torch.compile "
            f"{milliseconds(plain) / ms:.1f} times, of the loss factored by hand {milliseconds(lean) / ms:.1f} times |",
            f"| **memory** | {size(ours['peak_extra_bytes'])}, which is the gradient; the published loss holds "
            f"{size(port['peak_extra_bytes'])} |",
            f"| **exactness** | float32, beside float64: loss {error(ours['loss_error'])}, gradient "
            f"{error(ours['gradient_error'])} (relative) |",
        )
    )


class Page(NamedTuple):
    """A page with a part that is written from the results, between two markers."""

    path: Path
    marker: str
    write: Callable[[Results], str]

    def with_results(self, text: str, results: Results) -> str:
        """The page's text with that part replaced."""
        begin, end = (f"<!-- {self.marker}:{which} -->" for which in ("begin", "end"))
        before, found, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found and found_end):
            raise ValueError(f"{self.path.name} lacks {begin} or {end}")
        return f"{before}{begin}\n{self.write(results)}\n{end}{after}"


PAGES = (Page(ROOT / "README.md", "figures", figures), Page(ROOT / "docs/using/speed.md", "benchmarks", markdown))


def main(check: bool, pages: Sequence[Page] = PAGES, source: Path = SOURCE) -> int:
    """Write the pages' parts, or say whether they are current."""
    results, stale = Results.read(source), 0
    for page in pages:
        text = page.path.read_text()
        current = page.with_results(text, results)
        if not check:
            page.path.write_text(current)
        elif current != text:
            print(f"{page.path.name} is not what {source} says: run python -m benchmarks table")
            stale = 1
    return stale
