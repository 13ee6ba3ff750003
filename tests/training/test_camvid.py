"""The CamVid study: its data, its network, what people add to cross-entropy, and the report, on a tiny data set of its form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

pytest.importorskip("pandas", reason="pip install '.[study]'")
from benchmarks.segmentation import camvid, camvid_report, camvid_study
from benchmarks.segmentation.__main__ import main
from benchmarks.segmentation.adapt import class_mix
from benchmarks.segmentation.data import DataError, augment, to_tensor
from benchmarks.segmentation.network import SegmentationNetwork
from benchmarks.segmentation.stress import CONDITIONS
from benchmarks.segmentation.study import plain, read_runs, recorded_config
from benchmarks.segmentation.train import Training, cross_entropy, dice_loss, train

TINY = replace(
    camvid_study.PROTOCOL, backbone="residual", widths=(4, 6), pyramid_width=4, embedding_dim=8, iterations=3,
    batch_size=2, crop=(24, 32),
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("data") / "CamVid", {})


@pytest.fixture(scope="module")
def domains_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("domains") / "CamVid", {"train": 23, "test": 2})


def written(folder: Path, dusk: dict[str, int]) -> Path:
    """A folder of CamVid's form with noise, some of it named as the sequence at dusk."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 4), ("val", 2), ("test", 3)):
        (folder / name).mkdir(parents=True)
        (folder / f"{name}annot").mkdir()
        files = [f"{camvid.DUSK}_{number:03}.png" for number in range(dusk.get(name, 0))]
        files += [f"{name}_{number:03}.png" for number in range(count)]
        (folder / f"{name}.txt").write_text("".join(f"/SegNet/{name}/{f} /SegNet/{name}annot/{f}\n" for f in files))
        for file in files:
            Image.fromarray(rng.integers(0, 256, (36, 48, 3), np.uint8)).save(folder / name / file)
            Image.fromarray(rng.integers(0, 12, (36, 48), np.uint8)).save(folder / f"{name}annot" / file)
    return folder


def test_data_come_at_one_size_with_void_ignored(root):
    data = camvid.load_camvid(root, (24, 32))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [4, 2, 3]
    image, label = data.train[0]
    assert image.shape == (24, 32, 3) and label.shape == (24, 32)
    whole = np.array(Image.open(root / "trainannot" / "train_000.png").resize((32, 24), Image.Resampling.NEAREST))
    assert np.array_equal(label, np.where(whole == camvid.VOID, 255, whole)) and (whole == camvid.VOID).any()


def test_another_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"train\.txt does not exist; root is the folder CamVid"):
        camvid.load_camvid(tmp_path)


def test_choices_never_see_the_test_images(root):
    data = camvid.load_camvid(root, (24, 32))
    assert camvid_study.parts_of(data, "choices").test is data.validation
    assert camvid_study.parts_of(data, "main").test is data.test


def test_the_protocol_is_what_the_arms_do():
    """camvid_protocol.md was written before the runs; code that says otherwise would break its word."""
    protocol = (Path(camvid.__file__).with_name("camvid_protocol.md")).read_text()
    authors = next(arm for arm in camvid_study.ARMS["main"] if arm.name == "proac").config(camvid_study.PROTOCOL, 100)
    assert (authors.proac_weight, authors.temperature, authors.embedding_dim) == (0.1, 0.1, 256)
    assert (authors.prototypes, authors.num_negatives, authors.label_sampling) == ("uniform", None, "nearest")
    assert (authors.iterations, authors.batch_size, authors.crop, authors.enlarge) == (300, 8, (192, 256), 1.5)
    for words in (
        "lambda 0.1, temperature 0.1, D = 256", "300 steps of 8 images", "seeds 100 to 111", "seeds 0 to 3",
        "part `stress`, seeds 100 to 105", "part `prototypes`, seeds 100 to 102", "before steps 0, 33, ..., 297",
    ):  # fmt: skip
        assert words in " ".join(protocol.split())
    probed = [
        arm.config(camvid_study.PROTOCOL, 100) for part in ("stress", "prototypes") for arm in camvid_study.ARMS[part]
    ]
    assert [config.probe_every for config in probed] == [0, 33, 33, 33]
    assert probed[0] == replace(camvid_study.PROTOCOL, seed=100) and replace(probed[1], probe_every=0) == authors
    assert [replace(config, probe_every=0, prototypes="uniform") for config in probed[2:]] == [authors] * 2
    assert camvid_study.SEEDS["main"] == camvid_study.SEEDS["chosen"] == range(100, 112)
    assert camvid_study.SEEDS["choices"] == range(4) and camvid_study.SEEDS["supervised"] == range(100, 106)
    assert camvid_study.SEEDS["stress"] == range(100, 106) and camvid_study.SEEDS["prototypes"] == range(100, 103)
    assert set(camvid.RARE) == {"pole", "sign", "pedestrian", "cyclist"}


def test_what_is_chosen_did_best_on_the_validation_images():
    """Each option for itself, the authors' setting among its values, by the committed runs."""
    logs = camvid_report.read_logs(Path(camvid.__file__).parent / "results" / "camvid")
    means = camvid_report.scores(logs["choices"])["mean"].groupby(level="arm").mean()
    options = {}
    for name, changes in camvid_study.CHOICES.items():
        for option in changes:
            options.setdefault(option, ["lambda 0.1"]).append(name)
    assert set(options) == {
        "proac_weight", "temperature", "embedding_dim", "label_sampling", "negative_reduction", "head", "prototypes",
    }  # fmt: skip
    best = [max(names, key=lambda name: means[f"ProAC, {name}"]) for names in options.values()]
    assert [name for name in best if name != "lambda 0.1"] == list(camvid_study.CHOSEN)
    (chosen,) = camvid_study.ARMS["chosen"]
    config = chosen.config(camvid_study.PROTOCOL, 100)
    assert (config.proac_weight, config.temperature, config.embedding_dim) == (0.3, 0.05, 64)
    assert (config.negative_reduction, config.prototypes) == ("mean", "learnable")
    assert (config.label_sampling, config.head) == ("nearest", "linear")


@pytest.mark.slow
def test_a_small_study_is_run_by_two_processes_and_reported(root, tmp_path, capsys):
    camvid_study.run_part("main", root, tmp_path, seeds=[1, 2], jobs=2, protocol=TINY)
    runs = read_runs(tmp_path / "main" / "runs.jsonl")
    assert sorted((run["arm"], run["seed"]) for run in runs) == [
        ("cross_entropy", 1), ("cross_entropy", 2), ("proac", 1), ("proac", 2),
    ]  # fmt: skip
    assert {run["command"] for run in runs if run["seed"] == 2} == {
        "python -m benchmarks.segmentation camvid --root CamVid --part main --seeds 2 --output results/again"
    }
    camvid_study.run_part("choices", root, tmp_path, seeds=[1], protocol=TINY)
    camvid_study.run_part("supervised", root, tmp_path / "alone", seeds=[1], protocol=TINY)
    camvid_study.run_part("chosen", root, tmp_path, seeds=[1, 2], protocol=TINY)
    assert "Not compared yet: cross-entropy is of the part main" in camvid_report.report(tmp_path / "alone")
    for part in ("stress", "prototypes"):
        camvid_study.run_part(part, root, tmp_path / "alone", seeds=[1], protocol=replace(TINY, iterations=34))
    stressed = {run["arm"]: run for run in read_runs(tmp_path / "alone" / "stress" / "runs.jsonl")}
    assert set(CONDITIONS) < set(stressed["cross_entropy"]["scores"])
    assert stressed["cross_entropy"]["probes"] == [] and [p["step"] for p in stressed["proac"]["probes"]] == [0, 33]
    alone = camvid_report.report(tmp_path / "alone")
    means = [np.mean([100 * run["scores"][name]["mean_iou"] for name in CONDITIONS]) for run in stressed.values()]
    (line,) = (line for line in alone.splitlines() if line.startswith("| mean of the eight changes |"))
    assert line.startswith(f"| mean of the eight changes | {means[0]:.2f} | {means[1] - means[0]:+.2f} | ")
    assert "| test images | cross-entropy | + 0.1 ProAC (1) | class-weighted cross-entropy (1) |" in alone
    last = stressed["proac"]["probes"][-1]
    assert f"| 33 | {last['gradient_ratio']:.2f} | {last['own']:.2f} | {last['hardest']:.2f} |" in alone
    camvid_report.draw(tmp_path)
    text = camvid_report.report(tmp_path)
    assert (tmp_path / "differences.png").stat().st_size and "(differences.png)" in text
    score = {(run["arm"], run["seed"]): 100 * run["scores"]["clean"]["mean_iou"] for run in runs}
    pairs = [score["proac", seed] - score["cross_entropy", seed] for seed in (1, 2)]
    mean = sum(pairs) / 2
    (line,) = (line for line in text.splitlines() if line.startswith("| + 0.1 ProAC | 2 |"))
    assert f"| {mean:+.2f} +- " in line
    assert any(line.startswith("| ProAC, the best of each option | 2 |") for line in text.splitlines())
    unfinished = "Not finished, and nothing follows from it yet:"
    assert f"## choices\n\n{unfinished} 13 of 52 runs.\n\n| loss | seeds | validation mIoU |" in text
    assert "ProAC, nearest-exact" in text
    assert f"## main\n\n{unfinished} 0 of 24 runs.\n\n" in text, "seeds 1 and 2 are not the protocol's"
    with pytest.raises(SystemExit):
        main(["camvid"])
    assert "--root" in capsys.readouterr().err


def test_a_class_without_pixels_is_compared_where_it_has_some():
    def run(title: str, seed: int, mean: float, first: float | None) -> dict:
        ious = [first, None, *[mean] * (len(camvid.CLASS_NAMES) - 2)]
        return {"title": title, "seed": seed, "validation": mean, "scores": {"clean": {"mean_iou": mean, "iou": ious}}}

    baseline = camvid_report.scores([run("cross-entropy", seed, 0.5, 0.25) for seed in range(3)]).loc["cross-entropy"]
    means = (0.5, 0.75, 1.0)
    found = camvid_report.scores([run("ProAC", seed, mean, mean if seed else None) for seed, mean in enumerate(means)])
    row = camvid_report.differences(found, baseline)["ProAC"]
    cells = {name: pair.interval(2) for name, pair in row.items()}
    assert row["mean"].count == 3 and cells["mean"] == cells["car"] == "+25.00 +- 62.10"
    assert cells[camvid.CLASS_NAMES[0]] == "+62.50 +- 158.83" and cells[camvid.CLASS_NAMES[1]] == "-"


def test_enlarging_keeps_image_and_label_together():
    label = np.broadcast_to(np.arange(32, dtype=np.uint8) * 4, (24, 32)).copy()  # a slope of 4 a pixel
    image = np.repeat(label[..., None], 3, axis=2)
    plain = augment((image, label), (24, 32), np.random.default_rng(3))
    assert np.array_equal(plain[0][..., 0], plain[1])
    for seed in range(5):
        x, y = augment((image, label), (24, 32), np.random.default_rng(seed), enlarge=1.5)
        assert x.shape == (24, 32, 3) and y.shape == (24, 32)
        difference = np.abs(x[..., 0].astype(int) - y)
        assert np.quantile(difference, 0.9) <= 2  # bilinear beside nearest: half a pixel


def test_domains_share_no_image(domains_root):
    day, dusk = camvid.load_domains(domains_root, (24, 32))
    assert [len(part) for part in (day.train, day.validation, day.test)] == [4, 2, 3]
    assert [len(part) for part in (dusk.train, dusk.validation, dusk.test)] == [3, 20, 2]
    whole = camvid.load_camvid(domains_root, (24, 32)).train
    parts = [*dusk.train.samples, *dusk.validation.samples, *day.train.samples]
    assert all(np.array_equal(mine[0], whole[index][0]) for index, mine in enumerate(parts))


def test_class_mix_pastes_half_of_the_classes():
    torch.manual_seed(0)
    source_labels = torch.randint(0, 5, (4, 6, 8))
    source_labels[:, 0] = 255
    source, target, pseudo = torch.ones(4, 3, 6, 8), torch.zeros(4, 3, 6, 8), torch.full((4, 6, 8), 7)
    images, labels, pasted = class_mix(source, source_labels, target, pseudo)
    assert torch.equal(images, pasted[:, None].float().expand(-1, 3, -1, -1)) and not pasted[:, 0].any()
    assert torch.equal(labels, source_labels.where(pasted, 7))
    kinds = [tuple(labels[index][pasted[index]].unique().tolist()) for index in range(4)]
    assert {len(kind) for kind in kinds} == {3} and len(set(kinds)) > 1
    for index, kind in enumerate(kinds):  # every pixel of them, and of no other
        assert torch.equal(pasted[index], torch.isin(source_labels[index], torch.tensor(kind)))


@pytest.mark.slow
def test_a_small_adaptation_is_run_and_reported(domains_root, tmp_path):
    camvid_study.run_part("adaptation_trial", domains_root, tmp_path, seeds=[0, 1], protocol=TINY)
    runs = {(run["arm"], run["seed"]): run for run in read_runs(tmp_path / "adaptation_trial" / "runs.jsonl")}
    assert len(runs) == 8 and {len(run["scores"]) for run in runs.values()} == {4}
    text = camvid_report.report(tmp_path)
    own = {key: 100 * run["scores"]["dusk, own statistics"]["mean_iou"] for key, run in runs.items()}
    gain = np.mean([own["class_mix_proac", seed] - own["class_mix", seed] for seed in (0, 1)])
    (line,) = (line for line in text.splitlines() if line.startswith("| self-training, class-mix, + 0.1 ProAC | 2 |"))
    assert line.split(" | ")[-1].startswith(f"{gain:+.2f} +- ")
    assert "day, validation" in text and "Not finished" not in text


def test_focal_and_dice_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 4, generator=generator)
    labels = torch.randint(0, 3, (2, 5, 4), generator=generator)
    labels[0, :2] = 255
    kept = labels != 255
    p = logits.softmax(1).movedim(1, -1)[kept]
    own = p[torch.arange(len(p)), labels[kept]]
    torch.testing.assert_close(cross_entropy(logits, labels, focus=2.0), (-((1 - own) ** 2) * own.log()).mean())
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits, labels, ignore_index=255))
    terms = []
    for k in range(3):
        t = labels[kept] == k
        terms.append(1 - 2 * p[t, k].sum() / (p[:, k].sum() + t.sum()))
    torch.testing.assert_close(dice_loss(logits, labels), torch.stack(terms).mean())
    labels[labels == 2] = 1  # a class that the batch does not hold
    assert float(dice_loss(logits, labels)) < 1
    assert float(dice_loss(logits, torch.full_like(labels, 255))) == 0


def test_probes_change_nothing_that_is_trained(root):
    data = camvid.load_camvid(root, (24, 32))
    config = replace(TINY, proac_weight=0.1, num_negatives=20, prototypes="learnable")
    plain_run, probed = (train(replace(config, probe_every=every), data) for every in (0, 2))
    assert [record.probe is not None for record in probed.history] == [True, False, True]
    for name, value in plain_run.network.state_dict().items():
        assert torch.equal(value, probed.network.state_dict()[name]), name
    assert torch.equal(plain_run.proac.prototypes, probed.proac.prototypes)
    assert np.array_equal(plain_run.test.confusion, probed.test.confusion)


def test_a_probe_by_hand(root):
    """The gradients at the shared map by the chain rule through the two heads, which are linear; the cosines directly."""
    data = camvid.load_camvid(root, (24, 32))
    training = Training(replace(TINY, proac_weight=0.3), data)
    images, labels = next(training.source)
    found = training.probe(images, labels)
    network, proac = training.network, training.proac
    logits, features = (tensor.detach().requires_grad_() for tensor in network(images))
    cross_entropy(logits, labels).backward()
    (0.3 * proac(features, labels)).backward()
    heads = zip((features, logits), (network.embedding[0], network.classifier), strict=True)
    norms = [F.conv_transpose2d(output.grad, head.weight).norm() for output, head in heads]
    assert found["gradient_ratio"] == pytest.approx((norms[0] / norms[1]).item(), rel=1e-4)
    read = labels[:, ::4, ::4].flatten()
    cosines = F.normalize(features.detach().movedim(1, -1).flatten(0, 2)) @ F.normalize(proac.prototypes).T
    present = [k for k in range(11) if (read == k).any()]
    own = [cosines[read == k, k].mean() for k in present]
    hardest = [cosines[(read != k) & (read != 255), k].max() for k in present]
    assert found["own"] == pytest.approx(float(torch.stack(own).mean()), abs=1e-5)
    assert found["hardest"] == pytest.approx(float(torch.stack(hardest).mean()), abs=1e-5)


def test_the_pretrained_network_sees_what_imagenets_networks_see():
    pytest.importorskip("efficientnet_lite_pytorch", reason="pip install '.[study]'")
    network = SegmentationNetwork(11, 16, pyramid_width=8, backbone="lite0").eval()
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    seen = network.stem[0](to_tensor(image)[None])
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    truth = ((torch.from_numpy(image).float() / 255 - mean) / deviation).movedim(-1, 0)[None]
    torch.testing.assert_close(seen, truth, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        logits, embeddings = network(to_tensor(image)[None])
    assert logits.shape == (1, 11, 16, 24) and embeddings.shape == (1, 16, 16, 24)
    first = network.stem[1].weight
    assert first.shape[0] == 32 and float(first.detach().std()) > 0.1  # not what a fresh one starts from


def test_unknown_choices_are_named(root):
    data = camvid.load_camvid(root, (24, 32))
    with pytest.raises(ValueError, match="backbone: 'resnet' is none of residual, lite0"):
        Training(replace(TINY, backbone="resnet"), data)
    with pytest.raises(ValueError, match="supervised: 'lovasz' is none of cross_entropy, focal, dice"):
        Training(replace(TINY, supervised="lovasz"), data)


def test_the_committed_report_is_what_the_committed_runs_say():
    """Every run with the protocol's configuration, and all of each part."""
    folder = Path(camvid.__file__).parent / "results" / "camvid"
    assert (folder / "report.md").read_text(encoding="utf-8") == camvid_report.report(folder)
    for part, runs in camvid_report.read_logs(folder).items():
        pairs = {(arm.name, seed) for arm in camvid_study.ARMS[part] for seed in camvid_study.SEEDS[part]}
        done = [(run["arm"], run["seed"]) for run in runs]
        assert len(set(done)) == len(done) and set(done) <= pairs
        assert set(done) == pairs
        arms = {arm.name: arm for arm in camvid_study.ARMS[part]}
        for run in runs:
            assert recorded_config(run) == plain(arms[run["arm"]].config(camvid_study.PROTOCOL, run["seed"]))
            assert run["command"].startswith(f"python -m benchmarks.segmentation camvid --root CamVid --part {part} ")
            assert not run["commit"].endswith("+")
