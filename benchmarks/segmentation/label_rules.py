"""What of real label maps the features of a stride read, by either rule: python -m benchmarks.segmentation.label_rules.

A component is a connected set of pixels of one class, corners not counted as connections; it is lost where no feature reads
any of its pixels. Needs SciPy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from proac_cuda.diagnostics import labels_read
from proac_cuda.stages.pixels import read_nearest

from . import climate

RULES = ("nearest", "nearest-exact")


@dataclass
class Seen:
    """What one stride leaves of the label maps; arrays have a number for each class."""

    stride: int
    pixels: np.ndarray  # label pixels
    read: dict[str, np.ndarray]  # of those, the ones that the rule reads
    components: np.ndarray
    lost: dict[str, np.ndarray]  # components of which the rule reads nothing
    lost_by_vote: (
        np.ndarray
    )  # components of which no cell's majority is left, where each feature takes that of its cell
    lost_pixels: int  # label pixels of the components that "nearest" loses
    features: int
    differ: int  # features to which the two rules give different labels


def measure(maps: Iterable[np.ndarray], num_classes: int, stride: int) -> Seen:
    """Count over label maps (H, W) whose sides `stride` divides."""
    from scipy.ndimage import label as connected

    zeros = lambda: np.zeros(num_classes, np.int64)  # noqa: E731
    seen = Seen(
        stride,
        pixels=zeros(),
        read={rule: zeros() for rule in RULES},
        components=zeros(),
        lost={rule: zeros() for rule in RULES},
        lost_by_vote=zeros(),
        lost_pixels=0,
        features=0,
        differ=0,
    )
    for labels in maps:
        size = labels.shape[0] // stride, labels.shape[1] // stride
        if (size[0] * stride, size[1] * stride) != labels.shape:
            raise ValueError(f"labels of {labels.shape} do not divide by the stride {stride}")
        tensor = torch.from_numpy(labels.astype(np.int64))[None]
        for rule in RULES:
            counts = labels_read(tensor, size, num_classes, label_sampling=rule)
            seen.read[rule] += counts.read.numpy()
        seen.pixels += counts.labels.numpy()
        chosen = {rule: read_nearest(tensor, size, rule == "nearest-exact")[0] for rule in RULES}
        seen.features += chosen["nearest"].numel()
        seen.differ += int((chosen["nearest"] != chosen["nearest-exact"]).sum())
        cells = labels.reshape(size[0], stride, size[1], stride).swapaxes(1, 2).reshape(*size, -1)
        votes = np.stack([(cells == k).sum(-1) for k in range(num_classes)]).argmax(0)
        winners = votes.repeat(stride, 0).repeat(stride, 1)
        for k in np.unique(labels[labels < num_classes]):
            parts, count = connected(labels == k)
            seen.components[k] += count
            numbers = torch.from_numpy(parts.astype(np.int64))[None]
            for rule in RULES:
                found = np.unique(read_nearest(numbers, size, rule == "nearest-exact").numpy())
                missing = np.setdiff1d(np.arange(1, count + 1), found)
                seen.lost[rule][k] += len(missing)
                if rule == "nearest":
                    seen.lost_pixels += int(np.isin(parts, missing).sum())
            seen.lost_by_vote[k] += count - len(np.setdiff1d(parts[winners == k], [0]))
    return seen


def table(all_seen: Iterable[Seen], class_names: tuple[str, ...]) -> str:
    """Markdown: for each stride, all classes together and the class that loses the largest share of its components."""
    lines = [
        "| stride | features whose label differs between the rules | components lost: nearest | nearest-exact | majority vote "
        "| pixels in those that nearest loses | the class that loses most: nearest | nearest-exact | majority vote |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    percent = lambda part, whole: f"{100 * part / whole:.1f} %"  # noqa: E731
    for seen in all_seen:
        ways = (seen.lost["nearest"], seen.lost["nearest-exact"], seen.lost_by_vote)
        k = int((seen.lost["nearest"] / np.maximum(seen.components, 1)).argmax())
        everything = [percent(lost.sum(), seen.components.sum()) for lost in ways]
        worst = [percent(lost[k], seen.components[k]) for lost in ways]
        pixels = percent(seen.lost_pixels, seen.pixels.sum())
        worst[0] = f"{class_names[k]}, {worst[0]}"
        lines.append(
            "| "
            + " | ".join([str(seen.stride), percent(seen.differ, seen.features), *everything, pixels, *worst])
            + " |"
        )
    return "\n".join(lines)


def climate_maps() -> list[np.ndarray]:
    """Those of the demo's tiles, (120, 160) each."""
    labels = climate.load_labels()
    return [labels[climate.tile_window(row, column)] for row, column in climate.kept_tiles(labels)]


def main() -> None:
    maps = climate_maps()
    print(f"{len(maps)} label maps of {maps[0].shape}")
    classes = climate.CLASS_NAMES
    print(table((measure(maps, len(classes), stride) for stride in (2, 4, 8)), classes))


if __name__ == "__main__":
    main()
