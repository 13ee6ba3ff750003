"""Data sets for segmentation: one small protocol, a folder of images and masks, and seeded batches."""

from __future__ import annotations

import colorsys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

IGNORE_INDEX = 255
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")

Sample = tuple[np.ndarray, np.ndarray]  # image (H, W, 3) uint8, label (H, W) uint8
Colour = tuple[int, int, int]


class DataError(ValueError):
    """Something is wrong with the user's data; the message names the file."""


class SegmentationDataset(Protocol):
    """What the trainer and the report need: samples by index, and names and colours of the classes.

    A sample is an image (H, W, 3) and a label map (H, W), both uint8; IGNORE_INDEX marks ignored pixels.
    Samples may differ in size.
    """

    class_names: tuple[str, ...]
    colours: tuple[Colour, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Splits:
    """The three parts of a data set; they share class names and colours."""

    train: SegmentationDataset
    validation: SegmentationDataset
    test: SegmentationDataset


class ArrayDataset:
    """Samples held in memory."""

    def __init__(self, samples: list[Sample], class_names: tuple[str, ...], colours: tuple[Colour, ...]):
        self.samples, self.class_names, self.colours = samples, class_names, colours

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


class FolderDataset:
    """Pairs of image and mask files, read when asked for.

    Masks are single-channel or palette images. Their pixel values are class indices, and 255 is ignored; or what
    `classes_of_values` says, a value that it lacks being an error. With `check`, every pair is looked at once here, so
    that a bad file stops the run at its start and not after an hour; large published data sets do without.
    """

    def __init__(
        self,
        pairs: list[tuple[Path, Path]],
        class_names: tuple[str, ...],
        colours: tuple[Colour, ...] | None = None,
        *,
        classes_of_values: dict[int, int] | None = None,
        check: bool = True,
    ):
        self.pairs, self.class_names, self.classes_of_values = pairs, class_names, classes_of_values
        self.colours = colours or default_colours(len(class_names))
        for index in range(len(pairs) if check else 0):
            self[index]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image_path, mask_path = self.pairs[index]
        image, mask = read_image(image_path), read_mask(mask_path, self.class_names, self.classes_of_values)
        if image.shape[:2] != mask.shape:
            height, width = mask.shape
            raise DataError(
                f"{mask_path} is {width}x{height} pixels, "
                f"but its image {image_path} is {image.shape[1]}x{image.shape[0]}"
            )
        return image, mask


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file to read from; what goes wrong while reading names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError) as error:  # Pillow raises the second for some broken PNG files
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def read_image(path: Path) -> np.ndarray:
    """An image file as (H, W, 3) uint8."""
    with _opened(path) as image:
        return np.array(image.convert("RGB"))


def read_mask(path: Path, class_names: tuple[str, ...], classes_of_values: dict[int, int] | None = None) -> np.ndarray:
    """A mask file as (H, W) uint8 class indices and IGNORE_INDEX; any other value is an error."""
    with _opened(path) as image:
        if image.mode not in ("L", "P", "I", "I;16", "1"):
            raise DataError(
                f"{path} has mode {image.mode}; a mask is a single-channel or palette image of class indices"
            )
        mask = np.array(image).astype(np.int64)
    known = classes_of_values or {k: k for k in (*range(len(class_names)), IGNORE_INDEX)}
    values, places = np.unique(mask, return_inverse=True)
    for value in values.tolist():
        if value not in known:
            meant = (
                "in none of the data set's classes" if classes_of_values else f"outside the {len(class_names)} classes"
            )
            last = max(k for k in known if k != IGNORE_INDEX)
            raise DataError(
                f"{path} holds the label {value}, {meant} ({min(known)} to {last}; {IGNORE_INDEX} is ignored)"
            )
    return np.array([known[value] for value in values.tolist()], np.uint8)[places].reshape(mask.shape)


def read_class_names(path: Path) -> tuple[str, ...]:
    """Class names from a text file, one a line in the order of the label values; empty lines are skipped."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; it should list the class names, one a line")
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not 2 <= len(names) <= IGNORE_INDEX:
        raise DataError(f"{path} lists {len(names)} classes; 2 to {IGNORE_INDEX} are possible")
    return names


def classes_without(void: Sequence[int], num_classes: int) -> dict[int, int]:
    """Classes of mask values where some are void: the others, from 0 up, are the classes in order; 255 is ignored too."""
    classes = [value for value in range(IGNORE_INDEX) if value not in void][:num_classes]
    return {value: k for k, value in enumerate(classes)} | dict.fromkeys([*void, IGNORE_INDEX], IGNORE_INDEX)


def find_pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Image and mask files of the same stem, sorted by name. Masks without an image are not used."""
    for folder in (images, masks):
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder")
    by_stem: dict[str, Path] = {}
    for path in sorted(masks.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and by_stem.setdefault(path.stem, path) != path:
            raise DataError(f"{path} and {by_stem[path.stem]} are masks of the same name")
    image_paths = sorted(path for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not image_paths:
        raise DataError(f"{images} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    for path in image_paths:
        if path.stem not in by_stem:
            raise DataError(f"{path} has no mask: {masks / path.stem}.png is missing")
    return [(path, by_stem[path.stem]) for path in image_paths]


def folder_splits(
    images: Path,
    masks: Path,
    class_names: tuple[str, ...],
    *,
    held_out: float = 0.2,
    seed: int = 0,
    lists: Path | None = None,
    void: Sequence[int] = (),
) -> Splits:
    """The parts of a folder: as `lists` has them, or by a seeded shuffle.

    `lists` is a folder with train.txt, val.txt and test.txt, each with the name of an image a line, with or without its suffix.
    The shuffle holds out a share `held_out` each for validation and test, at least one image. Pixels whose mask holds a value
    of `void` are ignored (see classes_without).
    """
    pairs = find_pairs(images, masks)
    values = classes_without(void, len(class_names)) if void else None

    def dataset(part: list[tuple[Path, Path]]) -> FolderDataset:
        return FolderDataset(sorted(part), class_names, classes_of_values=values)

    if lists is not None:
        return Splits(*(dataset(_listed(lists / f"{part}.txt", pairs)) for part in ("train", "val", "test")))
    count = max(1, round(held_out * len(pairs)))
    if len(pairs) <= 2 * count:
        raise DataError(f"{images} holds {len(pairs)} images; with {count} each held out none is left to train on")
    order = np.random.default_rng(seed).permutation(len(pairs))
    shuffled = [pairs[i] for i in order]
    validation, test, train = shuffled[:count], shuffled[count : 2 * count], shuffled[2 * count :]
    return Splits(dataset(train), dataset(validation), dataset(test))


def _listed(path: Path, pairs: list[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """The pairs whose images a text file names, one a line."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; it should name the images of its part, one a line")
    by_name = {name: pair for pair in pairs for name in (pair[0].stem, pair[0].name)}
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise DataError(f"{path} is empty")
    for name in names:
        if name not in by_name:
            raise DataError(f"{path} names {name}, which is no image in {pairs[0][0].parent}")
    return [by_name[name] for name in names]


class ResizedDataset:
    """Another data set at one size (height, width): images bilinear, labels by the nearest pixel."""

    def __init__(self, dataset: SegmentationDataset, size: tuple[int, int]):
        self.dataset, self.size = dataset, size
        self.class_names, self.colours = dataset.class_names, dataset.colours

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return resize(self.dataset[index], self.size)


def check_labels(data: Splits) -> None:
    """Raise where there is nothing to train on or to score: a loss of 0 and a score of 100 % would be all that one saw.

    Reads no more masks than it has to: one or two of each part, where all is well.
    """
    names = data.train.class_names
    for part, dataset in vars(data).items():
        wanted, counts = 2, np.zeros(256, np.int64)
        for index in range(len(dataset)):
            counts += np.bincount(dataset[index][1].ravel(), minlength=256)
            if np.count_nonzero(counts[:IGNORE_INDEX]) >= wanted:
                break
        present = [names[k] for k in np.flatnonzero(counts[: len(names)])]
        if len(present) >= wanted:
            continue
        found = f"pixels of one class only, {present[0]!r}," if present else "no pixel of any class,"
        text = (
            f"the {part} part ({len(dataset)} images) has {found} and {counts[IGNORE_INDEX]} that are ignored "
            f"(label {IGNORE_INDEX})"
        )
        if counts[IGNORE_INDEX]:
            text += f"; if {IGNORE_INDEX} stands for a class in these masks, write its index, 0 to {len(names) - 1}, instead"
        if part == "train" or not present:
            raise DataError(text)
        warnings.warn(f"{text}. Its scores say little", stacklevel=2)


def default_colours(count: int) -> tuple[Colour, ...]:
    """Distinct colours for classes that bring none: hues by the golden ratio, in three brightnesses."""
    hues = ((0.618034 * i + 0.55) % 1.0 for i in range(count))
    levels = (0.9, 0.65, 0.45)
    rgb = (colorsys.hsv_to_rgb(hue, 0.75, levels[i % 3]) for i, hue in enumerate(hues))
    return tuple((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in rgb)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 to (3, H, W) float32, roughly centred."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(64.0).sub_(2.0)


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """A sample at another size (height, width): the image bilinear, labels by the nearest pixel."""
    image, label = (Image.fromarray(array) for array in sample)
    shape = size[::-1]
    return (
        np.array(image.resize(shape, Image.Resampling.BILINEAR)),
        np.array(label.resize(shape, Image.Resampling.NEAREST)),
    )


def augment(sample: Sample, crop: tuple[int, int], rng: np.random.Generator, enlarge: float = 1.0) -> Sample:
    """A random crop (height, width) and a random horizontal flip; what a small image lacks is ignored pixels.

    Before the crop the sample is enlarged by a random factor between 1 and ``enlarge``.
    """
    if enlarge > 1:
        factor = rng.uniform(1, enlarge)
        height, width = (round(factor * side) for side in sample[1].shape)
        sample = resize(sample, (height, width))
    image, label = sample
    missing = [max(0, want - have) for want, have in zip(crop, label.shape, strict=True)]
    if any(missing):
        pad = [(0, missing[0]), (0, missing[1])]
        image = np.pad(image, [*pad, (0, 0)])
        label = np.pad(label, pad, constant_values=IGNORE_INDEX)
    top, left = (rng.integers(have - want + 1) for want, have in zip(crop, label.shape, strict=True))
    window = np.s_[top : top + crop[0], left : left + crop[1]]
    image, label = image[window], label[window]
    return (image[:, ::-1], label[:, ::-1]) if rng.random() < 0.5 else (image, label)


class Batches(Iterator[tuple[torch.Tensor, torch.Tensor]]):
    """Endless augmented batches: images (B, 3, h, w) float32 and labels (B, h, w) int64.

    Order and augmentation follow from the seed alone, so two runs with the same seed see the same batches
    whatever their loss does with random numbers. Every epoch is a new shuffle, and a batch may span two.
    """

    def __init__(
        self, dataset: SegmentationDataset, batch_size: int, crop: tuple[int, int], seed: int, enlarge: float = 1.0
    ):
        self.dataset, self.batch_size, self.crop, self.enlarge = dataset, batch_size, crop, enlarge
        self.rng = np.random.default_rng(seed)
        self.queue: list[int] = []

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self.queue) < self.batch_size:
            self.queue.extend(self.rng.permutation(len(self.dataset)).tolist())
        picked, self.queue = self.queue[: self.batch_size], self.queue[self.batch_size :]
        samples = [augment(self.dataset[i], self.crop, self.rng, self.enlarge) for i in picked]
        labels = np.stack([label for _, label in samples]).astype(np.int64)
        return torch.stack([to_tensor(image) for image, _ in samples]), torch.from_numpy(labels)

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence stands; with it, another object over the same data goes on alike."""
        return {"rng": self.rng.bit_generator.state, "queue": list(self.queue)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]
        self.queue = list(state["queue"])
