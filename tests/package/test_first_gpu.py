"""The drill for a GPU: steps that fail, hang and resume; what is packed; tests that outlive a lost context."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import first_gpu
import gpu_tests
from steps import FAILED, LEFT_OUT, MOST_BYTES, MOST_FILES, PASSED, TOO_LONG, Drill, Step, shortened

ROOT = Path(__file__).resolve().parents[2]


def drill(tmp_path: Path, total: float = 60, gpu: bool = False) -> Drill:
    return Drill(tmp_path, tmp_path / "work", tmp_path / "out", total, gpu)


def python(name: str, code: str, limit: float = 20, **more: object) -> Step:
    return Step(name, [sys.executable, "-c", code], limit, **more)


def results(run: Drill) -> dict[str, str]:
    return {outcome.name: outcome.result for outcome in run.outcomes.values()}


# --- steps


def test_a_step_that_fails_or_takes_too_long_does_not_end_the_rest(tmp_path):
    run = drill(tmp_path)
    steps = [
        python("bad", "print('no luck'); raise SystemExit(3)"),
        python("endless", "import time; print('waiting', flush=True); time.sleep(60)", limit=0.7),
        Step("no such program", ["/nowhere/at/all"], 5),
        python("good", "print('done')"),
    ]
    began = time.monotonic()
    assert not run.run(steps)
    assert time.monotonic() - began < 30
    assert results(run) == {"bad": FAILED, "endless": TOO_LONG, "no such program": FAILED, "good": PASSED}
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| bad | 0 | failed | no luck |" in summary and "over its limit | waiting" in summary
    log = gzip.decompress((tmp_path / "out" / "log.txt.gz").read_bytes()).decode()
    assert "===== bad\nno luck" in log and "===== good\ndone" in log


def test_a_step_that_is_too_long_ends_with_its_children(tmp_path):
    run = drill(tmp_path)
    child = "import time, pathlib; time.sleep(4); pathlib.Path('late').touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    run.run([python("parent", code, limit=1)])
    time.sleep(4)
    assert not (tmp_path / "late").exists()


def test_a_step_that_ignores_the_request_to_end_is_ended(tmp_path):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    run = drill(tmp_path)
    run.run([python("deaf", code, limit=1), python("next", "print(1)")])
    assert results(run) == {"deaf": TOO_LONG, "next": PASSED}


def test_a_step_may_write_what_it_has_when_it_is_ended(tmp_path):
    code = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "try: time.sleep(60)\nexcept KeyboardInterrupt: print('kept')"
    )
    run = drill(tmp_path)
    run.run([python("polite", code, limit=1)])
    assert run.outcomes["polite"].note == "kept"


def test_steps_of_a_group_run_side_by_side(tmp_path):
    """Each waits for the other's file."""
    code = "import pathlib, time\npathlib.Path('{}').touch()\nwhile not pathlib.Path('{}').exists(): time.sleep(0.01)"
    run = drill(tmp_path)
    steps = [python("a", code.format("a", "b"), group="both"), python("b", code.format("b", "a"), group="both")]
    assert run.run([*steps, python("c", "pass")])


def test_a_second_run_takes_up_what_has_not_passed(tmp_path):
    count = "import pathlib; p = pathlib.Path('{0}'); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    fail_once = count + "; raise SystemExit(len(p.read_text()) == 1)"
    steps = [python("good", count.format("good")), python("flaky", fail_once.format("flaky"))]
    assert not drill(tmp_path).run(steps)
    second = drill(tmp_path)
    assert second.run(steps)
    assert results(second) == {"good": PASSED, "flaky": PASSED}
    assert (tmp_path / "good").read_text() == "x" and (tmp_path / "flaky").read_text() == "xx"
    drill(tmp_path).run(steps, again=["good"])
    assert (tmp_path / "good").read_text() == "xx" and (tmp_path / "flaky").read_text() == "xx"


def test_what_cannot_run_is_left_out_with_its_reason(tmp_path):
    run = drill(tmp_path)
    assert run.run([python("on a GPU", "", needs_gpu=True), python("profile", "", needs="no-such-profiler")])
    assert {o.note for o in run.outcomes.values()} == {"no GPU was found", "no-such-profiler is not on the path"}
    assert set(results(run).values()) == {LEFT_OUT}


def test_the_total_ends_the_step_under_way_and_leaves_out_the_rest(tmp_path):
    run = drill(tmp_path, total=2)
    run.run([python("long", "import time; time.sleep(60)", limit=60), python("rest", "pass")])
    assert results(run) == {"long": TOO_LONG, "rest": LEFT_OUT}
    assert run.outcomes["rest"].note == "no time is left"


# --- packing


def test_files_keep_to_the_limits(tmp_path):
    run = drill(tmp_path)
    noise = random.Random(0).randbytes(3 * MOST_BYTES).hex()
    run.run([python("loud", "pass")])
    run.log("loud").write_text(noise)
    files = {}
    for i in range(MOST_FILES):
        files[f"file{i}"] = tmp_path / f"file{i}"
        files[f"file{i}"].write_bytes(b"x")
    files["file0"].write_bytes(bytes(MOST_BYTES + 1))
    files["missing"] = tmp_path / "missing"
    run.pack(files)
    packed = list((tmp_path / "out").iterdir())
    assert len(packed) == MOST_FILES and all(path.stat().st_size <= MOST_BYTES for path in packed)
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "file0: 16.0 MiB, above 16 MiB" in summary and "missing: there is none" in summary
    assert f"file7: {MOST_FILES} files are there already" in summary


def test_long_logs_keep_both_ends():
    text = "begin" + "x" * 1000 + "end"
    short = shortened(text, 100)
    assert short.startswith("begin") and short.endswith("end") and "[... 908 characters ...]" in short
    assert shortened("abc", 100) == "abc"


# --- tests that outlive a lost context


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Runs a small suite, in which a test can crash, hang or lose the context; gives (exit status, outcomes)."""
    torch = "class cuda:\n is_available = staticmethod(lambda: True)\n is_initialized = is_available\n lost = False\n"
    torch += " @classmethod\n def synchronize(cls):\n  if cls.lost: raise RuntimeError('an illegal memory access')\n"
    (tmp_path / "torch.py").write_text(torch)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")

    def run(code: str, *arguments: str) -> tuple[int, dict[str, str]]:
        (tmp_path / "test_it.py").write_text(code)
        journal = tmp_path / "journal.jsonl"
        command = [sys.executable, str(ROOT / "scripts" / "gpu_tests.py"), str(journal), "--seconds", "3", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [*command, "--", "test_it.py", "-q", "-p", "no:cacheprovider"], cwd=tmp_path, env=environment
        )
        found = {name.split("::")[1]: event["outcome"] for name, event in gpu_tests.Journal(journal).outcomes().items()}
        return done.returncode, found

    return run


LOSES = """
import os, time, torch
def test_before(): pass
def test_loses():
    torch.cuda.lost = True
    assert False
def test_after(): assert not torch.cuda.lost
def test_fails(): assert False
def test_dies(): os._exit(11)
def test_hangs(): time.sleep(60)
def test_last(): pass
"""


@pytest.mark.slow
def test_tests_after_a_lost_context_run_in_a_fresh_process(suite):
    status, found = suite(LOSES)
    assert status == 1
    assert found == {
        "test_before": "passed",
        "test_loses": "failed",
        "test_after": "passed",
        "test_fails": "failed",
        "test_dies": "crashed",
        "test_hangs": "crashed",
        "test_last": "passed",
    }


def test_shards_share_the_tests_and_a_second_run_repeats_none(suite):
    code = "import pathlib, pytest\n" + "".join(f"def test_{i}(): open('ran', 'a').write('{i}')\n" for i in range(5))
    assert suite(code, "--shard", "2/2") == (0, {"test_1": "passed", "test_3": "passed"})
    assert suite(code, "--shard", "1/1") == (0, {"test_1": "passed", "test_3": "passed"}), "it has finished"


def test_a_suite_that_cannot_be_collected_fails(suite):
    assert suite("import nothing_of_this_name") == (1, {})


def test_a_run_in_which_every_test_is_skipped_has_failed_where_some_are_to_pass(suite):
    code = "import pytest\n@pytest.mark.skip(reason='no such GPU')\ndef test_it(): pass\n"
    assert suite(code) == (0, {"test_it": "skipped"})
    assert suite(code, "--some") == (1, {"test_it": "skipped"})


def test_the_summary_says_why_tests_were_skipped(tmp_path):
    journal = gpu_tests.Journal(tmp_path / "journal")
    for i in range(2):
        journal.write(test=f"a.py::test_{i}", outcome="skipped", seconds=0, message="('a.py', 3, 'Skipped: no GPU')")
    journal.write(test="a.py::test_bad", outcome="failed", seconds=0, message="")
    journal.write(finished=1)
    assert journal.summary() == "1 failed, 2 skipped (2 of them: no GPU); test_bad"


# --- the drill's own list


def options(**more: object) -> argparse.Namespace:
    return argparse.Namespace(**{"wheels": None, "build_limit": 200, **more})


H200 = {"name": "NVIDIA H200", "capability": "90", "gib": 139.8, "multiprocessors": 132, "l2_mib": 60}


def test_steps_name_what_exists(tmp_path):
    found = first_gpu.steps(options(), {"gpus": [H200]}, tmp_path)
    names = [step.name for step in found]
    assert len(set(names)) == len(names)
    for step in found:
        for word in step.command:
            if word.startswith(("tests/", "scripts/", "setup.py")):
                assert (ROOT / word).is_file(), word
    build = next(step for step in found if step.name == "build")
    assert build.environment["PROAC_CUDA_ARCHITECTURES"] == "90"


def test_steps_leave_time_for_the_benchmarks(tmp_path):
    """Two minutes, where everything before them takes as long as it may, and the build half of that."""
    found = first_gpu.steps(options(), {"gpus": [H200]}, tmp_path)
    before = found[: [step.name for step in found].index("benchmarks")]
    groups = {step.group or step.name: step.limit for step in before}
    groups["build"] /= 2
    assert sum(groups.values()) <= first_gpu.TOTAL - 120


def test_notes_say_what_a_tool_refuses():
    refused = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the list\n"
    assert first_gpu.sanitizer_note(refused).startswith("it refuses this machine: Error: Device not supported")
    assert first_gpu.sanitizer_note("11 passed in 3 s\n========= ERROR SUMMARY: 0 errors\n").startswith(
        "ERROR SUMMARY: 0"
    )
    assert "LibraryNotLoaded" in first_gpu.ncu_note("==ERROR== Failed to initialize the profiler: LibraryNotLoaded")
    assert first_gpu.ncu_note('==PROF== Profiling "a" - 1\n==PROF== Profiling "b" - 2') == "2 kernels"


def test_the_build_names_its_slowest_sources(tmp_path):
    (tmp_path / "build").mkdir()
    log = "# ninja log v5\n0\t1000\t1\ta.cu.o\tx\n0\t61000\t1\tcsrc_cuda_fast_half.cu.o\tx\n"
    (tmp_path / "build" / ".ninja_log").write_text(log)
    assert first_gpu.build_note("", tmp_path) == "longest: csrc_cuda_fast_half 61 s, a 1 s"
    assert first_gpu.build_note("x.cu(3): error: no\n", tmp_path) == "x.cu(3): error: no"


def test_benchmarks_say_how_fast_the_kernels_are(tmp_path):
    row = {"name": "crop", "dtype": "bfloat16", "mode": "graph", "both": {"median_ms": 0.5, "share_of_roof": 0.4}}
    rows = [{**row, "contestant": name} for name in ("cuda", "compiled", "eager")]
    path = tmp_path / "cuda.json"
    assert first_gpu.benchmark_note("interrupted\n", path) == "interrupted"
    path.write_text(json.dumps({"rows": rows}))
    expected = "crop bfloat16 cuda 0.5 ms (40 % of the roof); crop bfloat16 compiled 0.5 ms"
    assert first_gpu.benchmark_note("", path) == expected
