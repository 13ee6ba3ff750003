"""Published data sets from a local folder, laid out as their archives are, and as torchvision's classes expect them.

Nothing is downloaded. The official validation part is the test part here, since the labels of the official test parts
are mostly not public; a seeded tenth of the training images is the validation part.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .data import IGNORE_INDEX, Colour, DataError, FolderDataset, Splits, classes_without, find_pairs

Pairs = list[tuple[Path, Path]]

VOC_NAMES = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]

# Values in the files *_gtFine_labelIds.png of the 19 classes that are evaluated; the others are ignored.
CITYSCAPES: tuple[tuple[int, str, Colour], ...] = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
CITYSCAPES_LAST_ID = 33

CAMVID_NAMES = [
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
]


def load_voc(root: Path, year: str = "2012") -> Splits:
    """PASCAL VOC: root/VOCdevkit/VOC2012, as torchvision's VOCSegmentation unpacks it."""
    base = root / "VOCdevkit" / f"VOC{year}"

    def pairs(part: str) -> Pairs:
        stems = _lines(base / "ImageSets" / "Segmentation" / f"{part}.txt")
        folders = base / "JPEGImages", base / "SegmentationClass"
        return [(folders[0] / f"{stem}.jpg", folders[1] / f"{stem}.png") for stem in stems]

    return _splits(pairs("train"), pairs("val"), tuple(VOC_NAMES))


def load_cityscapes(root: Path) -> Splits:
    """Cityscapes: root/leftImg8bit and root/gtFine, the fine annotations."""

    def pairs(part: str) -> Pairs:
        images = _folder(root / "leftImg8bit" / part)
        found = sorted(images.glob("*/*_leftImg8bit.png"))
        if not found:
            raise DataError(f"{images} holds no city folders with *_leftImg8bit.png files")
        masks = _folder(root / "gtFine" / part)
        return [
            (path, masks / path.parent.name / path.name.replace("_leftImg8bit", "_gtFine_labelIds")) for path in found
        ]

    values = dict.fromkeys((*range(CITYSCAPES_LAST_ID + 1), IGNORE_INDEX), IGNORE_INDEX)
    values |= {value: k for k, (value, _, _) in enumerate(CITYSCAPES)}
    names, colours = tuple(name for _, name, _ in CITYSCAPES), tuple(colour for _, _, colour in CITYSCAPES)
    return _splits(pairs("train"), pairs("val"), names, colours, values)


def load_pet(root: Path) -> Splits:
    """Oxford-IIIT Pet: root/oxford-iiit-pet with images and trimaps; the border between pet and background is a class."""
    base = root / "oxford-iiit-pet"

    def pairs(part: str) -> Pairs:
        stems = [line.split()[0] for line in _lines(base / "annotations" / f"{part}.txt")]
        return [(base / "images" / f"{stem}.jpg", base / "annotations" / "trimaps" / f"{stem}.png") for stem in stems]

    names = ("pet", "background", "border")
    return _splits(pairs("trainval"), pairs("test"), names, values={k + 1: k for k in range(len(names))})


def load_ade20k(root: Path) -> Splits:
    """ADE20K as in the scene parsing benchmark (ADEChallengeData2016): 150 classes, value 0 ignored."""
    table = _lines(root / "objectInfo150.txt")[1:]
    names = tuple(line.split("\t")[-1].split(",")[0].strip() for line in table)
    values = {0: IGNORE_INDEX} | {k + 1: k for k in range(len(names))}
    train, test = (
        find_pairs(root / "images" / part, root / "annotations" / part) for part in ("training", "validation")
    )
    return _splits(train, test, names, values=values)


def load_camvid(root: Path) -> Splits:
    """Folders as of CamVid's common copy: train and trainannot, val and valannot, test and testannot.

    Class names stand in root/classes.txt, one a line; without it they are CamVid's eleven. The value after the last
    class is void and ignored, as is 255.
    """
    listed = root / "classes.txt"
    names = tuple(_lines(listed)) if listed.is_file() else tuple(CAMVID_NAMES)
    values = classes_without([len(names)], len(names))
    parts = (find_pairs(root / part, root / f"{part}annot") for part in ("train", "val", "test"))
    return Splits(*(FolderDataset(part, names, classes_of_values=values) for part in parts))


ADAPTERS: dict[str, Callable[[Path], Splits]] = {
    "voc": load_voc,
    "cityscapes": load_cityscapes,
    "pet": load_pet,
    "ade20k": load_ade20k,
    "camvid": load_camvid,
}


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise DataError(f"{path} is not a folder")
    return path


def _lines(path: Path) -> list[str]:
    """The lines of a list that comes with a data set, without empty ones and comments."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; is its data set unpacked in the folder that was named?")
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise DataError(f"{path} is empty")
    return found


def _splits(
    train: Pairs,
    test: Pairs,
    names: tuple[str, ...],
    colours: tuple[Colour, ...] | None = None,
    values: dict[int, int] | None = None,
) -> Splits:
    """A tenth of the training pairs, at least one, becomes the validation part. Files must exist; they are read later."""
    for path in (path for pair in (*train, *test) for path in pair):
        if not path.is_file():
            raise DataError(f"{path} is missing")
    count = max(1, len(train) // 10)
    if len(train) <= count:
        raise DataError(f"{train[0][0]} is the only training image")
    order = np.random.default_rng(0).permutation(len(train))
    validation, rest = ([train[i] for i in sorted(part)] for part in (order[:count], order[count:]))
    return Splits(
        *(
            FolderDataset(part, names, colours, classes_of_values=values, check=False)
            for part in (rest, validation, test)
        )
    )
