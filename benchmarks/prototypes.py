"""Does the arrangement of the prototypes matter? A small network on synthetic classes, trained with ProAC alone.

    python -m benchmarks.prototypes

At each (K, D) the same network, data and seeds meet three arrangements: random unit vectors, what 8 plain descents find (no
symmetry, nothing known), and `uniform_prototypes`. Printed are the arrangement's largest cosine, the loss and the share of
held-out samples whose nearest prototype is their class's, as mean and standard error over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from proac_cuda import proac_loss, prototype_certificate, uniform_prototypes
from proac_cuda.prototypes.descent import anneal, largest_cosines
from proac_cuda.prototypes.starts import random_starts

SIZES = ((59, 13), (275, 22))
INPUTS, HIDDEN, NOISE = 32, 128, 0.35


def random_prototypes(num_classes: int, dimension: int, seed: int) -> Tensor:
    rows = torch.randn(num_classes, dimension, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def descended_prototypes(num_classes: int, dimension: int, seed: int) -> Tensor:
    """The best of 8 descents from random vectors."""
    orbits = random_starts(num_classes, dimension, 8, torch.Generator().manual_seed(seed))
    levels = [torch.full((8,), 8.0 * 2.0**level, dtype=torch.float64) for level in range(9)]
    for annealed in anneal(orbits, levels, 30):
        orbits = annealed
    return orbits.vectors[largest_cosines(orbits).argmin()].float()


def train(prototypes: Tensor, seed: int, steps: int) -> tuple[float, float]:
    """(loss, accuracy) on held-out samples. Classes are Gaussian clouds around random unit vectors."""
    torch.manual_seed(seed)
    num_classes, dimension = prototypes.shape
    centres = nn.functional.normalize(torch.randn(num_classes, INPUTS), dim=1)

    def samples(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(num_classes, (count,))
        return centres[labels] + NOISE * torch.randn(count, INPUTS) / INPUTS**0.5 * 2, labels

    network = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, dimension))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(steps):
        inputs, labels = samples(2048)
        loss = proac_loss(network(inputs), labels, prototypes, negative_reduction="mean", ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inputs, labels = samples(8192)
    with torch.no_grad():
        features = network(inputs)
        loss = proac_loss(features, labels, prototypes, negative_reduction="mean", ignore_index=-100)
        return float(loss), float(((features @ prototypes.T).argmax(dim=1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    kinds: dict[str, Callable[[int, int, int], Tensor]] = {
        "random": random_prototypes,
        "descended": descended_prototypes,
        "uniform_prototypes": lambda k, d, seed: uniform_prototypes(k, d, seed=seed),
    }
    for size in SIZES:
        for kind, make in kinds.items():
            losses, accuracies, cosines = [], [], []
            for seed in range(arguments.seeds):
                prototypes = make(*size, seed)
                cosines.append(prototype_certificate(prototypes).largest_cosine)
                loss, accuracy = train(prototypes, seed, arguments.steps)
                losses.append(loss)
                accuracies.append(100 * accuracy)
            columns = "   ".join(
                f"{name} {statistics.mean(values):.4f} +- {statistics.stdev(values) / len(values) ** 0.5:.4f}"
                for name, values in (("largest cosine", cosines), ("loss", losses), ("accuracy %", accuracies))
            )
            print(f"K={size[0]} D={size[1]} {kind:19} {columns}", flush=True)


if __name__ == "__main__":
    main()
