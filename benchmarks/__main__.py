"""Benchmarks of the loss, on whatever is there.

python -m benchmarks                    everything, about a quarter of an hour on two cores
python -m benchmarks --quick            smaller, under three minutes
python -m benchmarks --gpu              real use at a GPU's sizes in two dtypes, two minutes on a large one
python -m benchmarks table [--check]    writes the figures of README.md and docs from benchmarks/results/cpu.json, or checks
python -m benchmarks plots FILE.json    draws the pictures of a run again
python -m benchmarks compare OLD NEW    what got slower beyond the noise
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import compare, exchange, ratios, table, training_step
from .losses import CONTESTANTS
from .problems import DTYPES
from .results import Results
from .run import Runner
from .sweeps import PLANS, Plan

RESULTS = Path("results/benchmarks")
EXTRAS = ("exchange", "training_step")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command")
    run = commands.add_parser("run", help="measure; the default")
    option = run.add_argument
    option("--quick", dest="plan", action="store_const", const="quick", default="full")
    option("--gpu", dest="plan", action="store_const", const="gpu")
    option("--tiny", dest="plan", action="store_const", const="tiny", help=argparse.SUPPRESS)
    names = [sweep.name for sweep in PLANS["full"]().sweeps] + list(EXTRAS)
    option("--sweep", nargs="+", choices=names, metavar="NAME", help=f"only these of {', '.join(names)}")
    option("--contestant", nargs="+", choices=list(CONTESTANTS), metavar="NAME", help=f"{', '.join(CONTESTANTS)}")
    option("--backend", nargs="+", metavar="NAME", help="of proac_cuda, only these; peers stay", choices=_backends())
    option("--dtype", choices=DTYPES, help="of the features, in every sweep but that of dtypes")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    option("--threads", type=int, default=torch.get_num_threads(), help="on the CPU (%(default)s)")
    option("--clock", choices=["wall", "cpu"], default="wall", help="cpu: this process's time, for busy machines")
    option("--memory-cap", type=float, default=4, metavar="GIB", help="of a contestant's call (%(default)s)")
    option("--slowest", type=float, metavar="SECONDS", help="a call that is still worth waiting for (30, quick 6)")
    option("--output", type=Path, default=RESULTS, help="folder of the JSON, CSV and PNG files (%(default)s)")

    check = commands.add_parser("table", help="the figures in README.md and docs/using/speed.md")
    check.add_argument("--check", action="store_true", help="fail where a page is not current")
    plots = commands.add_parser("plots", help="draw the pictures of a run again")
    plots.add_argument("file", type=Path)
    compare.add_arguments(commands.add_parser("compare", help="what got slower beyond the noise"))
    return top


def _backends() -> list[str]:
    return [name for name, contestant in CONTESTANTS.items() if contestant.backend]


def selected(plan: Plan, arguments: argparse.Namespace) -> Plan:
    """The part of a plan that the command line asks for."""

    def takes_part(name: str) -> bool:
        if arguments.contestant and name not in arguments.contestant:
            return False
        return not (arguments.backend and CONTESTANTS[name].backend and name not in arguments.backend)

    sweeps = []
    for sweep in plan.sweeps:
        if arguments.sweep and sweep.name not in arguments.sweep:
            continue
        problems = sweep.problems
        if arguments.dtype:
            same = [p for p in problems if p.dtype == arguments.dtype]
            changed = [dataclasses.replace(p, dtype=arguments.dtype) for p in problems]
            problems = tuple(same if sweep.name == "dtypes" else changed)
        contestants = tuple(filter(takes_part, sweep.contestants))
        sweeps.append(dataclasses.replace(sweep, problems=problems, contestants=contestants))
    return dataclasses.replace(plan, sweeps=tuple(sweeps), slowest=arguments.slowest or plan.slowest)


def measure(arguments: argparse.Namespace, console: Console, path: Path) -> Results:
    plan = selected(PLANS[arguments.plan](), arguments)
    extras = [name for name in EXTRAS if plan.extras and name in (arguments.sweep or EXTRAS)]
    total = sum(len(sweep.problems) for sweep in plan.sweeps) + len(extras) + 1
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)

        def report(text: str) -> None:
            progress.update(task, description=text, advance=0 if text.startswith("memory") else 1)
            if not console.is_terminal:
                console.print(text)

        def keep(results: Results) -> None:
            results.write(path)  # whatever ends the run

        cap = int(arguments.memory_cap * 2**30)
        runner = Runner(plan, arguments.device, arguments.threads, cap, arguments.clock == "cpu", report, keep)
        results = runner.results
        try:
            if plan.sweeps:
                runner.run()
        except KeyboardInterrupt:
            console.print("interrupted: what was measured so far is kept")
            return results
        if "exchange" in extras:
            report("bytes exchanged between two processes")
            results.exchange = exchange.measure()
        if "training_step" in extras:
            report("training steps of the demo")
            results.training_step = training_step.measure(plan.steps, arguments.device, arguments.threads)
    return results


def _command(options: list[str]) -> str:
    """The command as another machine would repeat it: without the folder."""
    if "--output" in options:
        at = options.index("--output")
        options = options[:at] + options[at + 2 :]
    return " ".join(["python -m benchmarks", *options])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("--") and argv[0] not in ("--help",):
        argv = ["run", *argv]
    arguments = parser().parse_args(argv)
    if arguments.command == "table":
        return table.main(arguments.check)
    if arguments.command == "compare":
        return compare.main(arguments)
    from . import plots  # which needs matplotlib

    if arguments.command == "plots":
        plots.draw(Results.read(arguments.file), arguments.file)
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was measured is kept
    path = arguments.output / f"{arguments.device.split(':')[0]}.json"
    results = measure(arguments, console, path)
    results.method["command"] = _command(argv[1:])
    results.write(path)
    plots.draw(results, path)
    table.show(results, console)
    ratios.show(results, console)
    console.print(f"Rows: {path}, {path.with_suffix('.csv')}; pictures beside them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
