"""The adapters of published data sets, on tiny folders laid out like theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="the demo's packages are not installed: pip install .[demo]")

from benchmarks.segmentation import __main__ as command_line
from benchmarks.segmentation.adapters import ADAPTERS, CITYSCAPES
from benchmarks.segmentation.data import IGNORE_INDEX, DataError, Splits

HEIGHT, WIDTH = 6, 9


def write(path: Path, array: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image = Image.frombytes("P", image.size, array.tobytes())
        image.putpalette([k for k in range(256) for _ in range(3)])
    image.save(path)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def pair(image: Path, mask: Path, values: list[int], palette: bool = False) -> None:
    """An image, and a mask whose columns hold the values in turn."""
    write(image, np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
    write(mask, np.tile(np.resize(np.array(values, np.uint8), WIDTH), (HEIGHT, 1)), palette)


def make_voc(root: Path) -> None:
    base = root / "VOCdevkit" / "VOC2012"
    for part, stems in {"train": ["a", "b", "c"], "val": ["d"]}.items():
        text(base / "ImageSets" / "Segmentation" / f"{part}.txt", "\n".join(stems) + "\n")
        for stem in stems:
            pair(base / "JPEGImages" / f"{stem}.jpg", base / "SegmentationClass" / f"{stem}.png", [0, 20, 255], True)


def make_cityscapes(root: Path) -> None:
    for part, towns in {"train": ["aachen", "bonn"], "val": ["ulm"]}.items():
        for town in towns:
            stem = f"{town}_000000_000019"
            image = root / "leftImg8bit" / part / town / f"{stem}_leftImg8bit.png"
            pair(image, root / "gtFine" / part / town / f"{stem}_gtFine_labelIds.png", [0, 7, 33])


def make_pet(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    for part, stems in {"trainval": ["Abyssinian_1", "beagle_2"], "test": ["pug_3"]}.items():
        text(base / "annotations" / f"{part}.txt", "".join(f"{stem} 1 1 1\n" for stem in stems))
        for stem in stems:
            pair(base / "images" / f"{stem}.jpg", base / "annotations" / "trimaps" / f"{stem}.png", [1, 2, 3])


def make_ade20k(root: Path) -> None:
    table = "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.2\t9\t1\t1\twall\n2\t0.1\t9\t1\t1\tbuilding, edifice\n"
    text(root / "objectInfo150.txt", table)
    for part, count in {"training": 3, "validation": 1}.items():
        for k in range(count):
            stem = f"ADE_{part}_{k}"
            pair(root / "images" / part / f"{stem}.jpg", root / "annotations" / part / f"{stem}.png", [0, 1, 2])


def make_camvid(root: Path) -> None:
    for part in ("train", "val", "test"):
        for k in range(2):
            pair(root / part / f"{part}{k}.png", root / f"{part}annot" / f"{part}{k}.png", [0, 10, 11], True)


# For each data set: how it is made, images in the three parts, number of classes, the classes of the values written,
# a mask file, and a value that it must not hold.
CASES = {
    "voc": (make_voc, (2, 1, 1), 21, [0, 20, 255], "VOCdevkit/VOC2012/SegmentationClass/d.png", 21),
    "cityscapes": (make_cityscapes, (1, 1, 1), 19, [255, 0, 18], "gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png", 34),
    "pet": (make_pet, (1, 1, 1), 3, [0, 1, 2], "oxford-iiit-pet/annotations/trimaps/pug_3.png", 4),
    "ade20k": (make_ade20k, (2, 1, 1), 2, [255, 0, 1], "annotations/validation/ADE_validation_0.png", 3),
    "camvid": (make_camvid, (2, 2, 2), 11, [0, 10, 255], "testannot/test0.png", 12),
}  # fmt: skip


def read_all(data: Splits) -> None:
    for part in vars(data).values():
        for index in range(len(part)):
            part[index]


@pytest.mark.parametrize("name", CASES)
def test_values_become_classes(name, tmp_path):
    make, counts, classes, expected, _, _ = CASES[name]
    make(tmp_path)
    data = ADAPTERS[name](tmp_path)
    assert tuple(len(part) for part in (data.train, data.validation, data.test)) == counts
    assert len(data.test.class_names) == len(set(data.test.class_names)) == len(data.test.colours) == classes
    for part in vars(data).values():
        image, label = part[0]
        assert image.shape == (HEIGHT, WIDTH, 3) and label.shape == (HEIGHT, WIDTH) and label.dtype == np.uint8
        assert (label == np.resize(expected, WIDTH)).all()


@pytest.mark.parametrize("name", CASES)
def test_unexpected_value_names_the_file(name, tmp_path):
    make, _, _, _, mask, value = CASES[name]
    make(tmp_path)
    write(tmp_path / mask, np.full((HEIGHT, WIDTH), value, np.uint8))
    with pytest.raises(DataError, match=rf"{Path(mask).name} holds the label {value}"):
        read_all(ADAPTERS[name](tmp_path))


@pytest.mark.parametrize("name", CASES)
def test_missing_mask_is_named(name, tmp_path):
    make, _, _, _, mask, _ = CASES[name]
    make(tmp_path)
    (tmp_path / mask).unlink()
    with pytest.raises(DataError, match=Path(mask).stem):
        ADAPTERS[name](tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_wrong_path_is_named(name, tmp_path, capsys):
    options = ["train", "--dataset", name, "--root", str(tmp_path / "nowhere"), "--device", "cpu"]
    assert command_line.main(options) == 2
    assert str(tmp_path / "nowhere") in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--dataset", "voc"], ["--images", "somewhere"], []])
def test_command_line_says_what_is_missing(options, capsys):
    assert command_line.main(["train", *options]) == 2
    assert "--root" in capsys.readouterr().err


def test_camvid_names_can_be_listed(tmp_path):
    make_camvid(tmp_path)
    names = [f"class {k}" for k in range(12)]
    text(tmp_path / "classes.txt", "\n".join(names))
    data = ADAPTERS["camvid"](tmp_path)
    assert list(data.train.class_names) == names and data.train[0][1].max() == 11


def test_an_image_and_its_mask_of_different_size(tmp_path):
    make_voc(tmp_path)
    mask = tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "d.png"
    write(mask, np.zeros((HEIGHT, WIDTH + 1), np.uint8))
    with pytest.raises(DataError, match=r"d\.png is 10x6 pixels, but its image .*d\.jpg is 9x6"):
        read_all(ADAPTERS["voc"](tmp_path))


def test_torchvision_finds_the_same_files(tmp_path):
    """The layouts are those that torchvision's classes read, file by file."""
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed")
    make_voc(tmp_path), make_cityscapes(tmp_path), make_pet(tmp_path)

    def ours(name: str) -> list[tuple[str, str]]:
        return [(str(image), str(mask)) for image, mask in ADAPTERS[name](tmp_path).test.pairs]

    voc = datasets.VOCSegmentation(str(tmp_path), image_set="val")
    assert ours("voc") == list(zip(voc.images, voc.masks, strict=True))
    cityscapes = datasets.Cityscapes(str(tmp_path), split="val", mode="fine", target_type="semantic")
    assert ours("cityscapes") == [
        (image, mask[0]) for image, mask in zip(cityscapes.images, cityscapes.targets, strict=True)
    ]
    evaluated = {
        item.id: (item.train_id, item.name, item.color) for item in cityscapes.classes if not item.ignore_in_eval
    }
    assert evaluated == {value: (k, name, colour) for k, (value, name, colour) in enumerate(CITYSCAPES)}
    pet = datasets.OxfordIIITPet(str(tmp_path), split="test", target_types="segmentation")
    assert len(pet) == 1
    mask = np.array(pet[0][1])
    assert np.array_equal(mask - 1, ADAPTERS["pet"](tmp_path).test[0][1]) and IGNORE_INDEX not in mask
