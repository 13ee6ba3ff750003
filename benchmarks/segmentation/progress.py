"""How far a training run is: a bar on a terminal, lines in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .train import StepRecord

LOG_EVERY = 50  # steps between lines where the output is no terminal

OnStep = Callable[[int, StepRecord], None]


@contextmanager
def progress_of(name: str, steps: int, console: Console) -> Iterator[OnStep]:
    """A bar on a terminal, a line every now and then elsewhere, so that a log says how far it is too."""

    def losses(record: StepRecord) -> str:
        proac = "" if record.proac is None else f", ProAC {record.proac:.1f}"
        return f"cross-entropy {record.cross_entropy:.2f}{proac}"

    if not console.is_terminal:
        yield (
            lambda step, record: (
                console.print(f"      step {step + 1} of {steps}: {losses(record)}")
                if (step + 1) % LOG_EVERY == 0
                else None
            )
        )
        return
    columns = (TextColumn("      {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[losses]}"), console=console, transient=True) as progress:
        bar = progress.add_task(name, total=steps, losses="")
        yield lambda step, record: progress.update(bar, completed=step + 1, losses=losses(record))
