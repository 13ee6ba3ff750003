"""Runs tests of kernels that may break the GPU's context, or hang, without losing the tests after them.

    python scripts/gpu_tests.py JOURNAL [--shard I/N] [--seconds S] [--some] -- PYTEST ARGUMENTS

After a kernel's illegal access every further call in the process fails. So each outcome is a line of the file JOURNAL as soon
as it is there; once the context is lost, or a test took longer than S seconds (60), or the process died, a fresh one goes on
with the tests that have no line yet. A second run does the same. --shard takes every N-th test, from the I-th on.
With --some a run in which every test was skipped has failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

MOST_MESSAGE = 600  # characters of a failure that the journal keeps
CONTEXT_LOST = 77  # exit status


class Journal:
    """One JSON line for each event: {"begun": test}, {"test", "outcome", "seconds", "message"}, {"finished": exit status}."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **event: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def events(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]

    def outcomes(self) -> dict[str, dict[str, Any]]:
        return {event["test"]: event for event in self.events() if "test" in event}

    def bury(self, reason: str) -> bool:
        """Give the test that was under way when its process ended an outcome; whether there was one."""
        done = self.outcomes()
        open_ones = [event["begun"] for event in self.events() if "begun" in event and event["begun"] not in done]
        for test in dict.fromkeys(open_ones):
            self.write(test=test, outcome="crashed", seconds=0.0, message=reason)
        return bool(open_ones)

    def finished(self) -> bool:
        return any("finished" in event for event in self.events())

    def summary(self) -> str:
        outcomes = self.outcomes().values()
        counts = Counter(event["outcome"] for event in outcomes)
        text = ", ".join(f"{counts[name]} {name}" for name in sorted(counts)) or "no test ran"
        bad = [event["test"].split("::")[-1] for event in outcomes if event["outcome"] in ("failed", "crashed")]
        reasons = Counter(event["message"] for event in outcomes if event["outcome"] == "skipped")
        if reasons:
            reason, count = reasons.most_common(1)[0]
            text += f" ({count} of them: {reason.rpartition('Skipped: ')[2].rstrip(')')[:100].strip(chr(39))})"
        text += "" if self.finished() else "; not to its end"
        return text + (f"; {', '.join(bad[:6])}{' ...' if len(bad) > 6 else ''}" if bad else "")


class Plugin:
    """In the process that runs the tests."""

    def __init__(self, journal: Journal, shard: tuple[int, int], seconds: float) -> None:
        self.journal, self.shard, self.seconds = journal, shard, seconds
        self.reports: dict[str, list[Any]] = {}

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        index, count = self.shard
        done = self.journal.outcomes()
        # Not those that the marks drop later: every shard is to get its part of what runs.
        wanted = config.getoption("markexpr") == "gpu"
        relevant = [item for item in items if not wanted or item.get_closest_marker("gpu")]
        kept = [item for item in relevant[index - 1 :: count] if item.nodeid not in done]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.journal.write(begun=nodeid)
        faulthandler.dump_traceback_later(self.seconds, exit=True)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.reports.setdefault(report.nodeid, []).append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        reports = self.reports.pop(nodeid, [])
        outcome = next((kind for kind in ("failed", "skipped") if any(r.outcome == kind for r in reports)), "passed")
        message = next((str(r.longrepr) for r in reports if r.outcome == outcome and r.longrepr), "")
        seconds = round(sum(r.duration for r in reports), 3)
        self.journal.write(test=nodeid, outcome=outcome, seconds=seconds, message=message[-MOST_MESSAGE:])
        if outcome == "failed" and context_is_lost():
            self.journal.write(lost=nodeid)
            sys.stdout.flush()
            os._exit(CONTEXT_LOST)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.journal.write(finished=int(exitstatus))


def context_is_lost() -> bool:
    """Whether every further call to the GPU would fail in this process."""
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    at = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("journal", type=Path)
    parser.add_argument("--shard", default="1/1", metavar="I/N")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--some", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the process that runs tests
    return parser.parse_args(argv[:at]), argv[at + 1 :]


def main(argv: list[str]) -> int:
    options, pytest_arguments = parse(argv)
    journal = Journal(options.journal)
    if options.inside:
        import pytest

        index, count = map(int, options.shard.split("/"))
        return int(pytest.main(pytest_arguments, plugins=[Plugin(journal, (index, count), options.seconds)]))
    options.journal.parent.mkdir(parents=True, exist_ok=True)
    while not journal.finished():
        before = len(journal.outcomes())
        done = subprocess.run([sys.executable, __file__, "--inside", *argv])
        buried = journal.bury(f"the process ended with {done.returncode}, or after {options.seconds:g} s")
        if not journal.finished() and not buried and len(journal.outcomes()) == before:
            print(f"gpu_tests: no test runs: pytest ended with {done.returncode}")
            return 1
    print(journal.summary())
    outcomes = [event["outcome"] for event in journal.outcomes().values()]
    if options.some and "passed" not in outcomes:
        return 1
    bad = "failed" in outcomes or "crashed" in outcomes
    ended = [event["finished"] for event in journal.events() if "finished" in event]
    return 1 if bad or ended[-1] not in (0, 1, 5) else 0  # 5: no test was left


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
