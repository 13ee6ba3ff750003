"""A patient descent of symmetric arrangements: how coordinates that come with the package were found.

    python scripts/find_prototypes.py 150 64 --group Z5 --seed 1 --output found.npy

Two arrangements at a time, orbits under a random representation of that group, descend while the sharpness rises by
an eighth a step. For other sizes try other seeds and groups; the search that needs no choice is
`python -m proac_cuda prototypes`.
"""

from __future__ import annotations

import argparse

import torch

from proac_cuda.prototypes import save_prototypes
from proac_cuda.prototypes.contacts import solve_contacts
from proac_cuda.prototypes.descent import Orbits, anneal, largest_cosine, largest_cosines
from proac_cuda.prototypes.starts import random_symmetry, symmetric_starts


def descend(orbits: Orbits) -> Orbits:
    sharpness, iterations = 8.0, 150
    while sharpness < 1e7:
        (orbits,) = anneal(orbits, [torch.full((len(orbits.vectors),), sharpness, dtype=torch.float64)], iterations)
        sharpness *= 1.13 if sharpness < 2000 else 2.0
        iterations = 50
    return orbits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("K", type=int)
    parser.add_argument("D", type=int)
    parser.add_argument("--group", required=True, help="its name, such as Z5, D6 or Z2xA4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(arguments.seed)
    with torch.no_grad():
        symmetry = random_symmetry(arguments.K, arguments.D, 2, generator, [arguments.group])
        if symmetry is None:
            parser.error(f"--group {arguments.group}: no arrangement of {arguments.K} vectors was found that has it")
        orbits = descend(symmetric_starts(symmetry, 2, generator))
        points = orbits.points()[largest_cosines(orbits).argmin()]
        points = solve_contacts(points) if points.numel() < 2000 else points
    print(f"largest cosine {largest_cosine(points):.10f}")
    save_prototypes(arguments.output, points)


if __name__ == "__main__":
    main()
