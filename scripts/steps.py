"""Steps with a limit of time each: their logs, one line for each in a summary, and a few small files to take home.

A step that fails, or that runs out of time, does not end the rest. Its outcome is kept in the work folder, so that a second run
takes up where the first one ended. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MOST_FILES = 8
MOST_BYTES = 16 << 20  # of a file
PASSED, FAILED, TOO_LONG, LEFT_OUT = "passed", "failed", "over its limit", "left out"


@dataclass
class Step:
    """``command`` runs in the repository's root. Consecutive steps of one ``group`` run side by side."""

    name: str
    command: Sequence[str]
    limit: float  #: seconds
    group: str = ""
    needs_gpu: bool = False
    needs: str = ""  #: a program on the path
    environment: dict[str, str] = field(default_factory=dict)
    note: Callable[[str], str] = lambda log: last_line(log)  #: what the summary says, out of the log


@dataclass
class Outcome:
    name: str
    result: str
    seconds: float = 0.0
    note: str = ""


def last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


class Drill:
    """Runs steps. ``work`` holds a log for each and steps.json; ``out`` what is worth taking home."""

    def __init__(self, root: Path, work: Path, out: Path, total: float, gpu: bool) -> None:
        self.root, self.work, self.out, self.gpu = root, work, out, gpu
        self.end = time.monotonic() + total
        self.title: list[str] = []  #: lines above the summary's table
        work.mkdir(parents=True, exist_ok=True)
        self.state = work / "steps.json"
        known = json.loads(self.state.read_text()) if self.state.is_file() else []
        self.outcomes = {entry["name"]: Outcome(**entry) for entry in known}

    def run(self, steps: Sequence[Step], again: Sequence[str] = ()) -> bool:
        """All steps that have not passed, or are named in ``again``; whether all of them passed or were left out."""
        order = {step.name: None for step in steps}
        waiting = [s for s in steps if s.name in again or self.result(s.name) != PASSED]
        while waiting:
            group = [s for s in waiting if s is waiting[0] or (s.group and s.group == waiting[0].group)]
            waiting = [s for s in waiting if s not in group]
            self._run_together(group)
            self.outcomes = {n: self.outcomes[n] for n in [*order, *self.outcomes] if n in self.outcomes}
            self.state.write_text(json.dumps([dataclasses.asdict(o) for o in self.outcomes.values()], indent=1))
            self.pack({})
        return all(self.result(name) in (PASSED, LEFT_OUT) for name in order)

    def result(self, name: str) -> str:
        return self.outcomes[name].result if name in self.outcomes else ""

    def log(self, name: str) -> Path:
        return self.work / (name.replace(" ", "_").replace(",", "") + ".log")

    def why_not(self, step: Step) -> str:
        if step.needs_gpu and not self.gpu:
            return "no GPU was found"
        if step.needs and shutil.which(step.needs) is None:
            return f"{step.needs} is not on the path"
        if self.end - time.monotonic() < 1:
            return "no time is left"
        return ""

    def _run_together(self, group: Sequence[Step]) -> None:
        running: dict[str, tuple[Step, subprocess.Popen[bytes], float, float]] = {}
        for step in group:
            if reason := self.why_not(step):
                self._finish(Outcome(step.name, LEFT_OUT, 0.0, reason))
                continue
            now = time.monotonic()
            with self.log(step.name).open("wb") as log:
                try:
                    process = subprocess.Popen(
                        list(step.command),
                        cwd=self.root,
                        env={**os.environ, **step.environment},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # so that its children end with it
                    )
                except OSError as error:
                    self._finish(Outcome(step.name, FAILED, 0.0, str(error)))
                    continue
            running[step.name] = (step, process, now, min(now + step.limit, self.end))
        while running:
            for name, (step, process, began, end) in list(running.items()):
                now = time.monotonic()
                if process.poll() is None and now < end:
                    continue
                late = process.poll() is None
                _end(process)
                text = self.log(name).read_text(errors="replace")
                result = TOO_LONG if late else PASSED if process.returncode == 0 else FAILED
                self._finish(Outcome(name, result, now - began, step.note(text) or last_line(text)))
                del running[name]
            time.sleep(0.05)

    def _finish(self, outcome: Outcome) -> None:
        self.outcomes[outcome.name] = outcome
        print(f"{outcome.seconds:6.1f} s  {outcome.name}: {outcome.result}; {outcome.note}", flush=True)

    def summary(self) -> str:
        rows = ["| step | seconds | result | |", "|---|---|---|---|"]
        for o in self.outcomes.values():
            note = o.note.replace("|", "\\|")
            rows.append(f"| {o.name} | {o.seconds:.0f} | {o.result} | {note} |")
        return "\n".join([*self.title, "", *rows, ""])

    def pack(self, files: dict[str, Path]) -> None:
        """The summary, the logs in one, and ``files`` (name in ``out``: where it is), within MOST_FILES and MOST_BYTES."""
        self.out.mkdir(parents=True, exist_ok=True)
        complaints = []
        for name, source in files.items():
            target = self.out / name
            if not source.is_file():
                complaints.append(f"{name}: there is none")
            elif len({f.name for f in self.out.iterdir()} | {"summary.md", "log.txt.gz", name}) > MOST_FILES:
                complaints.append(f"{name}: {MOST_FILES} files are there already")
            elif source.stat().st_size > MOST_BYTES:
                complaints.append(f"{name}: {source.stat().st_size / 2**20:.1f} MiB, above {MOST_BYTES >> 20} MiB")
            else:
                shutil.copyfile(source, target)
        parts = []
        for name in self.outcomes:
            if self.log(name).is_file():
                parts.append(f"\n===== {name}\n" + shortened(self.log(name).read_text(errors="replace")))
        (self.out / "log.txt.gz").write_bytes(
            gzip.compress(shortened("".join(parts), MOST_BYTES).encode()[:MOST_BYTES])
        )
        left = [f"Left behind: {complaint}." for complaint in complaints]
        (self.out / "summary.md").write_text("\n\n".join([self.summary(), *left]) + "\n")


def shortened(text: str, most: int = MOST_BYTES // 8) -> str:
    """Its beginning and its end where it is longer than ``most``."""
    if len(text) <= most:
        return text
    return f"{text[: most // 4]}\n[... {len(text) - most} characters ...]\n{text[-(most - most // 4) :]}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children, which have a session of their own."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        try:
            process.wait(5)  # to write what it has
        except subprocess.TimeoutExpired:
            continue
        if kind == signal.SIGTERM:
            time.sleep(0.1)  # its children may be about to end too
    process.wait()
