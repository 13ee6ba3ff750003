"""The segmentation study: its losses, its stress, interruption and resumption, and its report."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("matplotlib", reason="the demo's packages are not installed: pip install .[demo]")
pytest.importorskip("rich", reason="the demo's packages are not installed: pip install .[demo]")

from benchmarks.segmentation import __main__ as command_line
from benchmarks.segmentation import climate, stress
from benchmarks.segmentation.adapt import Teacher, with_statistics_of
from benchmarks.segmentation.data import IGNORE_INDEX, ArrayDataset, DataError, Splits
from benchmarks.segmentation.intervals import estimate, paired
from benchmarks.segmentation.network import SegmentationNetwork
from benchmarks.segmentation.study import ARMS, PROTOCOL, TARGETS, Arm, read_runs, recorded_config, run_study
from benchmarks.segmentation.study_figures import drawn, read_samples
from benchmarks.segmentation.study_report import report_text
from benchmarks.segmentation.train import (
    TrainConfig,
    cross_entropy,
    make_proac,
    median_frequency_weights,
    train,
)

COMMITTED = Path(command_line.__file__).parent / "results"
TINY = TrainConfig(iterations=9, batch_size=2, crop=(32, 32), widths=(8, 8, 8, 8), pyramid_width=8, embedding_dim=8)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that share their core with another process slow small steps by more than an order of magnitude."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def toy_splits(seed: int = 0) -> Splits:
    """Noisy images of three classes that differ in colour: horizontal bands of random height."""
    rng = np.random.default_rng(seed)

    def sample() -> tuple[np.ndarray, np.ndarray]:
        label = np.zeros((40, 48), np.uint8)
        label[: rng.integers(8, 16)] = 1
        label[rng.integers(26, 34) :] = 2
        image = np.array([[110, 110, 110], [220, 200, 120], [40, 60, 90]])[label] + rng.normal(0, 20, (40, 48, 3))
        return image.clip(0, 255).astype(np.uint8), label

    colours = ((0, 0, 0), (255, 255, 0), (0, 0, 255))
    return Splits(*(ArrayDataset([sample() for _ in range(n)], ("a", "b", "c"), colours) for n in (6, 2, 4)))


# --- losses


def test_weighted_cross_entropy_is_pytorchs():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    labels[0, :3] = IGNORE_INDEX
    weights = torch.tensor([0.5, 2.0, 1.0])
    expected = F.cross_entropy(logits, labels, weights, ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(cross_entropy(logits, labels, class_weight=weights), expected)
    # A pixel of weight 0 might as well be ignored.
    pixel_weight = torch.ones(2, 8, 8)
    pixel_weight[1, 4:] = 0
    ignored = labels.where(pixel_weight > 0, IGNORE_INDEX)
    torch.testing.assert_close(cross_entropy(logits, labels, pixel_weight), cross_entropy(logits, ignored))


def test_median_frequency_weights_by_hand():
    label = np.array([[0, 0, 0, 0], [1, 1, 2, IGNORE_INDEX]], np.uint8)
    dataset = ArrayDataset([(np.zeros((2, 4, 3), np.uint8), label)], ("a", "b", "c", "none"), ((0, 0, 0),) * 4)
    assert median_frequency_weights(dataset).tolist() == [0.5, 1.0, 2.0, 0.0]


def test_pixel_anchors_give_the_twin_alone():
    torch.manual_seed(0)
    features, labels = torch.randn(2, 8, 4, 4), torch.randint(0, 3, (2, 4, 4))
    twin = make_proac(replace(TINY, anchors="pixels", temperature=0.2), 3, 8)
    cosines = torch.einsum("bdhw,kd->bkhw", F.normalize(features), F.normalize(twin.prototypes))
    torch.testing.assert_close(twin(features, labels), F.cross_entropy(cosines / 0.2, labels))


@pytest.mark.parametrize("field", ["anchors", "prototypes", "head"])
def test_unknown_option(field):
    with pytest.raises(ValueError, match="nonsense"):
        train(replace(TINY, proac_weight=0.5, **{field: "nonsense"}), toy_splits())


def test_learnable_prototypes_learn_and_others_do_not():
    data = toy_splits()
    base = replace(TINY, proac_weight=0.5, iterations=2)
    for kind in ("uniform", "random", "learnable"):
        config = replace(base, prototypes=kind)
        start = make_proac(config, 3, 8).prototypes.detach().clone()
        assert torch.equal(train(config, data).proac.prototypes, start) == (kind != "learnable"), kind


# --- adaptation


def test_teacher_averages_and_labels():
    torch.manual_seed(0)
    network = SegmentationNetwork(3, 8, (8, 8, 8, 8), 8)
    teacher = Teacher(network, 0.9)
    values = []
    for step in range(3):
        with torch.no_grad():
            network.classifier.bias.fill_(float(step))
        teacher.update(network)
        values.append(float(teacher.network.classifier.bias[0]))
    assert values == pytest.approx([0.0, 0.5, 1.0])  # plain means at first

    with torch.no_grad():
        network.classifier.bias.copy_(torch.randn(3))
    images = torch.randn(2, 3, 32, 32)
    everything, confidence = teacher.label(images, keep=1.0)
    labels, _ = teacher.label(images, keep=0.25)
    assert (everything != IGNORE_INDEX).all() and confidence.shape == (2, 32, 32)
    kept = labels != IGNORE_INDEX
    assert torch.equal(labels[kept], everything[kept])
    for k in everything.unique():
        members = everything == k
        assert float(kept[members].float().mean()) == pytest.approx(0.25, abs=0.02)
        assert confidence[members & kept].min() >= confidence[members & ~kept].max()


def test_statistics_of_another_domain_change_a_copy_alone():
    data = toy_splits()
    network = SegmentationNetwork(3, 8, (8, 8, 8, 8), 8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    adapted = with_statistics_of(network, data.train, 2, (32, 32), "cpu")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    changed = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("running" in name or "num_batches" in name for name in changed)


# --- stress


def test_changes_of_the_images():
    rng = np.random.default_rng(0)
    image = rng.integers(1, 100, (120, 160, 3), np.uint8)
    assert stress.rescaled(0.5)(image, rng).shape == (60, 80, 3)
    assert stress.rescaled(2)(image, rng).shape == (240, 320, 3)
    assert np.array_equal(stress.gamma(1)(image, rng), image)
    assert (stress.gamma(2)(image, rng) < image).all() and (stress.gamma(0.5)(image, rng) > image).all()
    assert np.array_equal(stress.brightness(2)(image, rng), 2 * image)
    assert stress.brightness(1.4)(np.full((1, 1, 3), 250, np.uint8), rng).tolist() == [[[255] * 3]]
    for share, hidden in ((0.15, 7), (0.3, 14)):
        masked = stress.masked(share)(image, np.random.default_rng(1))
        grey = (masked == stress.GREY).all(2)
        assert grey.sum() == hidden * stress.PATCH**2 and np.array_equal(masked[~grey], image[~grey])


def test_every_condition_is_scored_at_the_labels_resolution():
    data = toy_splits()
    torch.manual_seed(0)
    network = SegmentationNetwork(3, 8, (8, 8, 8, 8), 8)
    scores = stress.stress_scores(network, data.test)
    assert set(scores) == set(stress.CONDITIONS) and len(scores) == 8
    assert all(found.confusion.sum() == 4 * 40 * 48 for found in scores.values())


# --- interruption


EVERYTHING = replace(
    TINY,
    proac_weight=0.5,
    num_negatives=20,
    prototypes="learnable",
    self_training=True,
    class_mix=True,
    confidence_weighted=True,
)


@pytest.mark.parametrize(
    "config",
    [pytest.param(TINY, id="cross-entropy"), pytest.param(EVERYTHING, id="everything", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("stop", [1, 3, 7])
def test_an_interrupted_run_comes_to_the_same_end(config, stop, tmp_path):
    data, target = toy_splits(), toy_splits(1).train
    whole = train(config, data, target=target)

    class Interrupted(Exception):
        pass

    def interrupt(step: int, record: object) -> None:
        if step == stop:
            raise Interrupted

    options = {"target": target, "checkpoint": tmp_path / "run.pt", "checkpoint_every": 2}
    with pytest.raises(Interrupted):
        train(config, data, interrupt, **options)
    assert (tmp_path / "run.pt").exists() == (stop > 1)
    steps: list[int] = []
    resumed = train(config, data, lambda step, record: steps.append(step), **options)
    assert steps == list(range(stop // 2 * 2, 9))

    def losses(result) -> list[tuple]:
        return [(record.cross_entropy, record.proac, record.pseudo_label_accuracy) for record in result.history]

    assert losses(resumed) == losses(whole)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name
    if config.proac_weight:
        assert torch.equal(whole.proac.prototypes, resumed.proac.prototypes)
    assert np.array_equal(whole.test.confusion, resumed.test.confusion)


def test_a_checkpoint_of_another_configuration_or_a_broken_one_is_named(tmp_path):
    data, path = toy_splits(), tmp_path / "run.pt"
    train(TINY, data, checkpoint=path, checkpoint_every=4)
    with pytest.raises(DataError, match=r"run\.pt cannot be resumed: .*another configuration"):
        train(replace(TINY, seed=1), data, checkpoint=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"run\.pt cannot be resumed"):
        train(TINY, data, checkpoint=path)


TOY_ARMS = [arm for arm in ARMS if arm.name in ("cross_entropy", "proac", f"{TARGETS[0]}-confident_proac", "head_mlp")]


def toy_study(output: Path, protocol: TrainConfig = TINY, seeds: int = 2, on_step=None) -> None:
    targets = {name: toy_splits(number) for number, name in enumerate(TARGETS, 1)}
    run_study(TOY_ARMS, lambda arm: list(range(seeds)), toy_splits(), targets, output, protocol, on_step)


def without_timings(run: dict) -> dict:
    return {name: value for name, value in run.items() if "seconds" not in name}


@pytest.mark.slow
def test_a_study_that_is_killed_again_and_again(tmp_path):
    """SIGKILL at several moments; the log that comes out in the end is that of a study left alone."""
    long = replace(TINY, iterations=120)
    toy_study(tmp_path / "whole", long, seeds=1)
    code = (
        "import sys, torch; sys.path[:0] = ['.', 'tests', 'tests/training']; torch.set_num_threads(1)\n"
        "from dataclasses import replace; from pathlib import Path; import test_segmentation_study as t\n"
        f"t.toy_study(Path({str(tmp_path / 'killed')!r}), replace(t.TINY, iterations=120), 1)\n"
    )
    root = Path(__file__).parents[2]
    checkpoints = tmp_path / "killed" / "checkpoints"
    seen: set[tuple[str, int]] = set()
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=root)
        while process.poll() is None:  # until a checkpoint that no process before this one had written
            found = {(path.name, path.stat().st_mtime_ns) for path in checkpoints.glob("*.pt")} - seen
            if found:
                seen |= found
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
            time.sleep(0.001)
        if process.returncode == 0:
            break
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
    whole, killed = (read_runs(tmp_path / name / "runs.jsonl") for name in ("whole", "killed"))
    assert len(seen) >= 3 and len(whole) == len(TOY_ARMS)
    assert list(map(without_timings, killed)) == list(map(without_timings, whole))


# --- the log and the report


@pytest.fixture(scope="module")
def toy_log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    torch.set_num_threads(1)
    toy_study(folder, replace(TINY, iterations=4))
    return folder


@pytest.mark.slow
def test_every_run_is_written_once(toy_log):
    runs = read_runs(toy_log / "runs.jsonl")
    assert [(run["seed"], run["arm"]) for run in runs] == [(seed, arm.name) for seed in (0, 1) for arm in TOY_ARMS]
    for run in runs:
        assert run["arm"] in run["command"] and run["config"]["seed"] == run["seed"] and run["commit"]
        assert {"clean"} <= set(run["scores"]) and len(run["scores"]["clean"]["iou"]) == 3
    assert set(stress.CONDITIONS) < set(runs[0]["scores"])
    before = (toy_log / "runs.jsonl").read_bytes()
    steps: list[int] = []
    toy_study(toy_log, replace(TINY, iterations=4), on_step=lambda *step: steps.append(1))
    assert not steps and (toy_log / "runs.jsonl").read_bytes() == before
    assert not list((toy_log / "checkpoints").glob("*.pt"))


@pytest.mark.slow
def test_another_configuration_asks_for_another_folder(toy_log):
    with pytest.raises(DataError, match="cross_entropy-seed0 with another configuration"):
        toy_study(toy_log, replace(TINY, iterations=5))


@pytest.mark.slow
def test_a_line_cut_short_is_run_again(toy_log, tmp_path):
    log = tmp_path / "runs.jsonl"
    whole = (toy_log / "runs.jsonl").read_bytes()
    log.write_bytes(whole[:-300])
    assert len(read_runs(log)) == 7
    toy_study(tmp_path, replace(TINY, iterations=4))
    assert list(map(without_timings, read_runs(log))) == list(map(without_timings, read_runs(toy_log / "runs.jsonl")))
    log.write_bytes(b"{\n" + whole)
    with pytest.raises(DataError, match=r"runs\.jsonl, line 1, is not JSON"):
        read_runs(log)


def test_arms_differ_as_their_names_say():
    assert len({arm.name for arm in ARMS}) == len(ARMS)
    configs = [(arm.config(PROTOCOL, 0), arm.target) for arm in ARMS]
    assert len(set(configs)) == len(ARMS)
    assert Arm("x", "x", "supervised", {"iterations_factor": 1.5}).config(TINY, 3) == replace(
        TINY, iterations=14, seed=3
    )


def test_intervals_by_hand():
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.deviation, found.count) == (2.0, 1.0, 3)
    assert found.half_width == pytest.approx(4.302652730 / 3**0.5)
    assert found.verdict == "no measurable difference"
    assert estimate([1.0, 1.1, 0.9]).verdict == "higher" and estimate([-1.0, -1.1, -0.9]).verdict == "lower"
    assert estimate([5.0]).verdict == "one seed, no interval"
    assert paired({0: 3.0, 1: 5.0, 7: 0.0}, {0: 1.0, 1: 1.0}) == estimate([2.0, 4.0])
    none = paired({0: 3.0, 2: float("nan")}, {1: 1.0, 2: 1.0})
    assert (none.count, none.verdict, none.interval()) == (0, "", "-")
    assert estimate([5.0]).interval(2) == "+5.00" and found.interval(sign="±") == "+2.0 ± 2.5"


@pytest.mark.slow
def test_report_of_a_small_study(toy_log, capsys):
    assert command_line.main(["report", "--runs", str(toy_log), "--output", str(toy_log / "report")]) == 0
    text = (toy_log / "report" / "report.md").read_text()
    for word in (
        "## In short",
        "## Supervised",
        "## Under stress",
        "## Domain adaptation",
        "## Ablations",
        "## Commands",
    ):
        assert word in text
    runs = read_runs(toy_log / "runs.jsonl")
    clean = {(run["arm"], run["seed"]): 100 * run["scores"]["clean"]["mean_iou"] for run in runs}
    gain = estimate([clean["proac", seed] - clean["cross_entropy", seed] for seed in (0, 1)])
    assert f"| CE + ProAC | 2 | {np.mean([clean['proac', s] for s in (0, 1)]):.1f} +- " in text
    assert f"{gain.mean:+.1f} +- {gain.half_width:.1f}" in text
    pictures = {path.name for path in (toy_log / "report").glob("*.png")}
    assert pictures == set(drawn(runs, read_samples(toy_log / "samples")))
    assert {"classes.png", "differences.png", "curves.png"} <= pictures
    assert all(f"]({name})" in text for name in pictures)


def test_report_of_one_part_and_one_seed():
    """Parts without runs have no section; one seed has neither deviation nor interval, and is not counted."""
    runs = [run for run in read_runs(COMMITTED / "runs.jsonl") if run["plan"] == "supervised" and run["seed"] == 0]
    runs[0]["scores"]["clean"]["iou"][1] = None  # a class without pixels
    runs[1]["scores"]["clean"]["iou"][1] = 0.0
    text = report_text(runs, [])
    headings = re.findall("^## (.*)", text, re.M)
    assert headings == ["In short", "Protocol", "Supervised", "Under stress", "Cost", "Commands"]
    assert "0 paired differences were looked at" in " ".join(text.split()) and "None" not in text and "nan" not in text
    clean, weighted = (100 * run["scores"]["clean"]["mean_iou"] for run in runs[:2])
    change = f"{weighted - clean:+.1f}"
    assert f"| class-weighted CE | 1 | {weighted:.1f} | {change} | one seed, no interval |" in text
    assert re.search(r"^\| cross-entropy \(CE\) \| [\d.]+ \| - \|", text, re.M)
    assert re.search(r"^\| class-weighted CE \| [\d.]+ \| 0\.0 \|", text, re.M)


def test_report_without_runs(tmp_path, capsys):
    assert command_line.main(["report", "--runs", str(tmp_path)]) == 2
    assert "runs.jsonl holds no finished run" in capsys.readouterr().err


def test_the_committed_report_is_what_the_committed_runs_say():
    runs = read_runs(COMMITTED / "runs.jsonl")
    pictures = list(drawn(runs, read_samples(COMMITTED / "samples")))
    assert (COMMITTED / "report.md").read_text(encoding="utf-8") == report_text(runs, pictures)
    assert all((COMMITTED / name).is_file() for name in pictures)
    known = {arm.name: arm for arm in ARMS}
    for run in runs:
        config = json.loads(json.dumps(known[run["arm"]].config(PROTOCOL, run["seed"]).__dict__))
        assert recorded_config(run) == config, "the protocol has changed since: run the study again"
        assert not run["commit"].endswith("+")


def test_the_documentation_quotes_the_committed_report():
    """Rows and findings stand there word for word, and the README's figures among them."""
    root = COMMITTED.parents[2]
    page = (root / "docs" / "using" / "study.md").read_text(encoding="utf-8")
    quoted = [line for line in page.splitlines() if line.startswith(("| ", "- "))]
    section = (root / "README.md").read_text(encoding="utf-8").split("## Does it help?\n")[1].split("\n## ")[0]
    figures = re.findall(r"[+-]?\d+\.\d+ \+- \d+\.\d+", section)
    assert len(figures) == 6 and all(any(figure in line for line in quoted) for figure in figures)
    reports = (COMMITTED / "report.md", COMMITTED / "camvid" / "report.md")
    report = [line for path in reports for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(quoted) > 8
    assert [line for line in quoted if line not in report] == []


# --- the real data


@pytest.mark.slow
def test_a_short_run_on_satellite_tiles_learns():
    try:
        data = climate.load_climate()
    except DataError as error:
        pytest.skip(str(error))
    result = train(replace(PROTOCOL, proac_weight=0.5, iterations=70), data)
    for field in ("cross_entropy", "proac"):
        first, last = (np.mean([getattr(r, field) for r in result.history[part]]) for part in (np.s_[:10], np.s_[-10:]))
        assert last < 0.85 * first, field
    assert result.test.mean_iou > 0.3


def test_the_style_between_is_the_mean():
    try:
        first, second, between = (climate.load_image(style)[600:700] for style in ("blue_marble", *TARGETS))
    except DataError as error:
        pytest.skip(str(error))
    assert np.abs(between - (first.astype(float) + second) / 2).max() <= 0.5
