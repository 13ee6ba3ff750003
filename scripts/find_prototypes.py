"""A patient descent of symmetric arrangements: how coordinates that come with the package were found.

    python scripts/find_prototypes.py 150 64 --group 5 --seed 1 --output found.npy      largest cosine 0.033130

Two arrangements at a time, orbits of a random action of the cyclic group of that order, descend while the sharpness rises by
an eighth a step. For other sizes try other seeds and groups; the search that needs no choice is
`python -m proac_cuda prototypes`.
"""

from __future__ import annotations

import argparse

import torch

from proac_cuda.prototypes import save_prototypes
from proac_cuda.prototypes.contacts import solve_contacts
from proac_cuda.prototypes.descent import Orbits, anneal, largest_cosine, largest_cosines
from proac_cuda.prototypes.starts import symmetric_starts


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
    parser.add_argument("--group", type=int, nargs="+", required=True, help="orders of the cyclic factors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(arguments.seed)
    with torch.no_grad():
        orbits = symmetric_starts(arguments.K, arguments.D, 2, generator, [tuple(arguments.group)])
        orbits = descend(orbits)
        points = orbits.points()[largest_cosines(orbits).argmin()]
        points = solve_contacts(points) if points.numel() < 2000 else points
    print(f"largest cosine {largest_cosine(points):.10f}")
    save_prototypes(arguments.output, points)


if __name__ == "__main__":
    main()
