"""What transforms do to label maps: the table of docs/using/frameworks.md, each cell of it run.

``python scripts/label_transforms.py`` prints it anew; a row whose package is missing is left out, with a word on stderr.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import numpy as np
import torch

SIZES = [(size, wanted) for size in (13, 20, 26, 64, 104, 250) for wanted in (5, 11, 22, 32, 43, 129)]
DTYPES = ("uint8", "int16", "int32", "int64")
IGNORED = 255


class Row(NamedTuple):
    """``resize(labels, (h, w))`` and ``rotate(labels, **fill)``, by 45 degrees, of a NumPy map (H, W)."""

    version: str
    name: str
    resize: Callable[[np.ndarray, tuple[int, int]], Any]
    rotate: Callable[..., Any] | None = None
    fill: dict[str, Any] = {}  # what makes it fill with 255
    fill_text: str = ""


def torch_rows() -> list[Row]:
    def resize(mode):
        def call(labels, size):
            return torch.nn.functional.interpolate(torch.from_numpy(labels)[None, None], size, mode=mode)[0, 0]

        return call

    return [
        Row(torch.__version__, f'`interpolate(mode="{mode}")`', resize(mode)) for mode in ("nearest", "nearest-exact")
    ]


def torchvision_rows() -> list[Row]:
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    def resize(labels, size):
        return v2.Resize(size)(tv_tensors.Mask(labels))

    def rotate(labels, **fill):
        return v2.RandomRotation((45, 45), **fill)(tv_tensors.Mask(labels))

    fill = {"fill": {tv_tensors.Mask: IGNORED, "others": 0}}
    return [
        Row(
            version("torchvision"),
            "torchvision v2 `Resize`, `RandomRotation` of a `Mask`",
            resize,
            rotate,
            fill,
            "`fill={Mask: 255, ...}`",
        )
    ]


def pillow_rows() -> list[Row]:
    from PIL import Image

    def resize(labels, size):
        return np.array(Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST))

    def rotate(labels, **fill):
        return np.array(Image.fromarray(labels).rotate(45, **fill))

    fill = {"fillcolor": IGNORED}
    return [Row(version("pillow"), "PIL `resize(NEAREST)`, `rotate`", resize, rotate, fill, "`fillcolor=255`")]


def opencv_rows() -> list[Row]:
    import cv2

    def resize(mode):
        return lambda labels, size: cv2.resize(labels, size[::-1], interpolation=mode)

    def rotate(labels, **fill):
        center = ((labels.shape[1] - 1) / 2, (labels.shape[0] - 1) / 2)
        matrix = cv2.getRotationMatrix2D(center, 45, 1)
        return cv2.warpAffine(labels, matrix, labels.shape[::-1], flags=cv2.INTER_NEAREST, **fill)

    where = "OpenCV `resize(INTER_NEAREST)`, `warpAffine`", resize(cv2.INTER_NEAREST), rotate
    return [
        Row(cv2.__version__, *where, {"borderValue": IGNORED}, "`borderValue=255`"),
        Row(cv2.__version__, "OpenCV `resize(INTER_NEAREST_EXACT)`", resize(cv2.INTER_NEAREST_EXACT)),
    ]


def kornia_rows() -> list[Row]:
    import kornia.augmentation as K
    from kornia.constants import DataKey

    def run(transform, labels, **options):
        mask = torch.from_numpy(labels)[None, None]
        both = K.AugmentationSequential(transform, data_keys=["input", "mask"], **options)
        return both(torch.zeros(1, 3, *labels.shape), mask)[1][0, 0]

    def rotate(labels, **fill):
        if not fill:
            return run(K.RandomRotation((45.0, 45.0), p=1.0), labels)
        turn = K.RandomAffine((45.0, 45.0), p=1.0, padding_mode="fill", fill_value=torch.zeros(3))
        return run(turn, labels, extra_args={DataKey.MASK: {"resample": "nearest", "align_corners": False, **fill}})

    name, fill = "kornia `Resize`, `RandomRotation`", {"fill_value": torch.tensor([255.0])}
    text = '`RandomAffine(padding_mode="fill")`, `extra_args={DataKey.MASK: {"fill_value": tensor([255.0]), ...}}`'
    return [Row(version("kornia"), name, lambda labels, size: run(K.Resize(size), labels), rotate, fill, text)]


def albumentations_rows() -> list[Row]:
    import albumentations as A

    def run(transform, labels):
        return A.Compose([transform])(image=np.zeros((*labels.shape, 3), np.uint8), mask=labels)["mask"]

    def rotate(labels, **fill):
        return run(A.Rotate((45, 45), p=1, **fill), labels)

    where = (
        version("albumentationsx"),
        "AlbumentationsX `Resize`, `Rotate`",
        lambda labels, size: run(A.Resize(*size), labels),
    )
    return [Row(*where, rotate, {"fill_mask": IGNORED}, "`fill_mask=255`")]


def monai_rows() -> list[Row]:
    import monai.transforms as M

    def run(transform, labels):
        return torch.as_tensor(transform(torch.from_numpy(labels)[None])[0])

    def resize(labels, size):
        return run(M.Resize(size, mode="nearest"), labels)

    def rotate(labels, **options):
        return run(M.Rotate(math.pi / 4, mode="nearest", **options), labels)

    def resize_by_default(labels, size):
        return run(M.Resize(size), labels)

    def rotate_by_default(labels):
        return run(M.Rotate(math.pi / 4), labels)

    return [
        Row(version("monai"), 'MONAI `Resize`, `Rotate`, with `mode="nearest"`', resize, rotate),
        Row(version("monai"), "MONAI `Resize`, `Rotate`, as they are", resize_by_default, rotate_by_default),
    ]


def nnunet_rows() -> list[Row]:
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    def resize(labels, size):
        spacing = [1.0, 1.0, 1.0]
        shape = (1, *size)
        return resample_data_or_seg_to_shape(labels[None, None], shape, spacing, spacing, is_seg=True, order=1)[0, 0]

    def rotate(labels, **fill):
        turn = SpatialTransform(labels.shape, 0, False, p_rotation=1, rotation=(math.pi / 4, math.pi / 4), **fill)
        image = torch.zeros(1, *labels.shape)
        return turn(image=image, segmentation=torch.from_numpy(labels)[None])["segmentation"][0]

    fill = {"border_mode_seg": "constant", "padding_value_seg": IGNORED}
    text = "`padding_value_seg=255`; nnU-Net itself says -1, and turns that to 0"
    return [Row(version("nnunetv2"), "nnU-Net resampling, `SpatialTransform`", resize, rotate, fill, text)]


def transformers_rows() -> list[Row]:
    from transformers import SegformerImageProcessor

    def resize(labels, size):
        processor = SegformerImageProcessor(size={"height": size[0], "width": size[1]})
        return processor(np.zeros((*labels.shape, 3), np.uint8), labels, return_tensors="pt")["labels"][0]

    return [Row(version("transformers"), "transformers `SegformerImageProcessor`", resize)]


def mmseg_rows() -> list[Row]:
    if importlib.util.find_spec("mmcv._ext") is None:  # mmcv-lite: see examples/head_mmsegmentation.py
        sys.modules["mmcv._ext"] = MagicMock(__spec__=importlib.machinery.ModuleSpec("mmcv._ext", None))
    from mmseg.datasets.transforms import PackSegInputs, RandomRotate
    from mmseg.datasets.transforms.transforms import Resize

    def run(transform, labels):
        image = np.zeros((*labels.shape, 3), np.uint8)
        turned = transform(
            {"img": image, "gt_seg_map": labels, "seg_fields": ["gt_seg_map"], "img_shape": labels.shape}
        )
        return PackSegInputs(meta_keys=())(turned)["data_samples"].gt_sem_seg.data[0]

    def resize(labels, size):
        return run(Resize(scale=size[::-1], keep_ratio=False), labels)

    def rotate(labels, **fill):
        return run(RandomRotate(prob=1, degree=(45, 45), **fill), labels)

    where = (version("mmsegmentation"), "mmsegmentation `Resize`, `RandomRotate`, `PackSegInputs`", resize, rotate)
    return [Row(*where, {"seg_pad_val": IGNORED}, "`seg_pad_val=255`, the default")]


ROWS = [
    torch_rows,
    torchvision_rows,
    pillow_rows,
    opencv_rows,
    kornia_rows,
    albumentations_rows,
    monai_rows,
    nnunet_rows,
    transformers_rows,
    mmseg_rows,
]


def rule(resize: Callable[[np.ndarray, tuple[int, int]], Any]) -> str:
    """Which label each output reads, compared with PyTorch's two rules on 36 pairs of sizes."""
    agree = {"nearest": 0, "nearest-exact": 0}
    for size, wanted in SIZES:
        index = np.arange(size, dtype=np.uint8)[None].repeat(8, 0)
        found = np.asarray(resize(index, (8, wanted)))[0].astype(np.float64)
        for mode in agree:
            line = torch.arange(size, dtype=torch.float32)[None, None]
            expected = torch.nn.functional.interpolate(line, wanted, mode=mode)[0, 0].numpy()
            agree[mode] += np.array_equal(found, expected)
    best = max(agree, key=lambda mode: agree[mode])
    if agree[best] == len(SIZES):
        return best
    if agree[best] > len(SIZES) / 2:
        return f"{best}, but for {len(SIZES) - agree[best]} of {len(SIZES)} sizes"
    return "neither rule"


def corner(rotate: Callable[..., Any], fill: dict[str, Any]) -> int:
    """The label in a corner that the turned map does not reach."""
    labels = np.ones((41, 41), np.uint8)
    return int(np.asarray(rotate(labels, **fill))[0, 0])


def dtype_after(row: Row, dtype: str) -> str:
    """What a map of that type comes back as; a dash where it raises."""
    try:
        return str(np.asarray(row.resize(np.ones((20, 20), dtype), (5, 5))).dtype)
    except (TypeError, RuntimeError, ValueError, NotImplementedError):
        return "raises"


def line(row: Row) -> str:
    """One line of the table."""
    cells = [f"{row.name}, {row.version.partition('+')[0]}", rule(row.resize)]
    if row.rotate is None:
        cells += ["", ""]
    else:
        default = corner(row.rotate, {})
        cells.append(f"**{default}**" if default == 0 else str(default))
        if row.fill:
            assert corner(row.rotate, row.fill) == IGNORED, row.name
        cells.append(row.fill_text or "no option")
    cells += [dtype_after(row, dtype) for dtype in DTYPES]
    return f"| {' | '.join(cells)} |"


def table() -> list[str]:
    """The lines of the table whose packages are there."""
    head = ["transform, version", "a resized map reads", "turned corners", "filled with 255 by", *DTYPES]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for make in ROWS:
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                lines += [line(row) for row in make()]
        except ModuleNotFoundError as error:
            print(f"left out, {make.__name__.replace('_', ' ')}: {error}", file=sys.stderr)
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
