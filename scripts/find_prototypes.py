"""A patient descent of arrangements with one symmetry: how coordinates that come with the package were found.

    python scripts/find_prototypes.py 90 13 --group Z3xS3 --representation 1 2 2 3 4 5 --orbits 0 0 0 0 0 \\
        --starts 48 --output found.npy

Orbits under a representation of that group, random ones where `--representation` and `--orbits` do not say which, descend while
the sharpness rises by an eighth a step. The best goes on without its symmetry for so many `--seconds`. The search that needs no
choice is `python -m proac_cuda prototypes`.
"""

from __future__ import annotations

import argparse
import time

import torch

from proac_cuda.prototypes import save_prototypes
from proac_cuda.prototypes.contacts import solve_contacts
from proac_cuda.prototypes.descent import Orbits, anneal, largest_cosine, largest_cosines
from proac_cuda.prototypes.search import search
from proac_cuda.prototypes.starts import Symmetry, random_symmetry, symmetric_starts


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
    parser.add_argument("--representation", type=int, nargs="+", metavar="N", help="its irreducible parts, by number")
    parser.add_argument(
        "--orbits", type=int, nargs="+", metavar="N", help="the stabiliser of each orbit, by number; 0: trivial"
    )
    parser.add_argument("--starts", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(arguments.seed)
    with torch.no_grad():
        symmetry = random_symmetry(arguments.K, arguments.D, 2, generator, [arguments.group])
        if arguments.representation and arguments.orbits:
            symmetry = Symmetry(arguments.group, tuple(arguments.orbits), (tuple(arguments.representation),))
        if symmetry is None:
            parser.error(f"--group {arguments.group}: no arrangement of {arguments.K} vectors was found that has it")
        orbits = descend(symmetric_starts(symmetry, arguments.starts, generator))
        points = orbits.points()[largest_cosines(orbits).argmin()]
        points = solve_contacts(points)
        print(f"with its symmetry {largest_cosine(points):.10f}; {symmetry}")
        if arguments.seconds:
            began = time.monotonic()
            for found in search(arguments.K, arguments.D, larger=points, endless=True):
                points = found.points
                if time.monotonic() - began > arguments.seconds:
                    break
    print(f"largest cosine {largest_cosine(points):.10f}")
    save_prototypes(arguments.output, points)


if __name__ == "__main__":
    main()
