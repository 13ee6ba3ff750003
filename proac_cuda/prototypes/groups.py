"""Finite groups by their permutations: elements, real irreducible representations, subgroups."""

from __future__ import annotations

import itertools
import re
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Permutation = tuple[int, ...]


class Group(NamedTuple):
    """A group of p elements, of which number 0 is the neutral one."""

    name: str
    irreducible: tuple[Tensor, ...]  # (p, d, d) orthogonal matrices, one for each real irreducible representation
    subgroups: tuple[tuple[int, ...], ...]  # one of each class of conjugate ones, the trivial one first, the group last
    cosets: tuple[tuple[int, ...], ...]  # for each of these an element of every left coset, 0 first

    @property
    def order(self) -> int:
        """How many elements it has."""
        return len(self.irreducible[0])


@lru_cache(maxsize=64)
def named_group(name: str) -> Group:
    """A direct product of named groups, such as "Z2xA4".

    Z12 is cyclic, D6 dihedral with 12 elements, S4 symmetric, A5 alternating, Q8 the quaternions' units, He3 Heisenberg's
    group of order 27, and 7:3 the maps x -> a x + b of the integers modulo 7 with a in the group of order 3 that the smallest
    such number generates.

    Raises:
        ValueError: not such a name.
    """
    product = _product_table(_elements(_generators(name)))
    subgroups = _subgroups(product)
    cosets = tuple(_cosets(product, subgroup) for subgroup in subgroups)
    return Group(name, _irreducible(product), subgroups, cosets)


def character(matrices: Tensor) -> Tensor:
    """(p,): the traces of a representation's matrices."""
    return matrices.diagonal(dim1=1, dim2=2).sum(dim=1)


def _generators(name: str) -> list[Permutation]:
    factors = [_factor(part) for part in name.split("x")]
    generators = []
    for number, factor in enumerate(factors):
        for generator in factor:
            parts = [generator if k == number else tuple(range(len(other[0]))) for k, other in enumerate(factors)]
            generators.append(_side_by_side(parts))
    return generators


def _side_by_side(permutations: list[Permutation]) -> Permutation:
    result: list[int] = []
    for permutation in permutations:
        result += [len(result) + k for k in permutation]
    return tuple(result)


def _factor(name: str) -> list[Permutation]:
    if name == "Q8":
        return [(1, 2, 3, 0, 5, 6, 7, 4), (4, 7, 6, 5, 2, 1, 0, 3)]
    if name == "He3":  # point (a, b) of a plane over three elements is number 3 a + b: (a + 1, b), and (a, b + a)
        return [(3, 4, 5, 6, 7, 8, 0, 1, 2), (0, 1, 2, 4, 5, 3, 8, 6, 7)]
    if match := re.fullmatch(r"(\d+):(\d+)", name):
        modulus, order = int(match[1]), int(match[2])
        for a in range(2, modulus):
            powers = [pow(a, k, modulus) for k in range(1, order + 1)]
            if powers[-1] == 1 and 1 not in powers[:-1]:
                return [_cycle(modulus), tuple(a * k % modulus for k in range(modulus))]
    if match := re.fullmatch(r"([ZDSA])(\d+)", name):
        kind, size = match[1], int(match[2])
        swap, threes = (1, 0, *range(2, size)), [(1, k, *range(2, k), 0, *range(k + 1, size)) for k in range(2, size)]
        reflection = tuple(-k % size for k in range(size))
        kinds = {"Z": [_cycle(size)], "D": [_cycle(size), reflection], "S": [_cycle(size), swap], "A": threes}
        if size >= {"Z": 1, "D": 3, "S": 2, "A": 3}[kind]:
            return kinds[kind]
    raise ValueError(f"group: got {name!r}, expected factors such as Z12, D6, S4, A5, Q8, He3 or 7:3, joined by x")


def _cycle(size: int) -> Permutation:
    return (*range(1, size), 0)


def _elements(generators: list[Permutation]) -> list[Permutation]:
    elements = [tuple(range(len(generators[0])))]
    known = set(elements)
    for element in elements:  # grows on the way
        for generator in generators:
            product = tuple(element[k] for k in generator)
            if product not in known:
                known.add(product)
                elements.append(product)
    return elements


def _product_table(elements: list[Permutation]) -> list[list[int]]:
    number = {element: k for k, element in enumerate(elements)}
    return [[number[tuple(left[k] for k in right)] for right in elements] for left in elements]


def _irreducible(product: list[list[int]]) -> tuple[Tensor, ...]:
    """The eigenspaces of a symmetric matrix that commutes with the regular representation and is generic otherwise.

    Such a matrix is A[g, h] = f(g^-1 h) with f(g) = f(g^-1). Each of its eigenspaces is invariant and irreducible, and every
    real irreducible representation is among them.
    """
    order = len(product)
    table = torch.tensor(product, device="cpu")
    inverse = (table == 0).to(torch.int64).argmax(dim=1)
    values = torch.randn(
        order, generator=torch.Generator(device="cpu").manual_seed(0), dtype=torch.float64, device="cpu"
    )
    values = values + values[inverse]
    eigenvalues, vectors = torch.linalg.eigh(values[table[inverse]])
    ends = [0, *(k for k in range(1, order) if float(eigenvalues[k] - eigenvalues[k - 1]) > 1e-7), order]
    found: list[Tensor] = []
    for begin, end in itertools.pairwise(ends):
        basis = vectors[:, begin:end]
        # The element g takes e_h to e_gh.
        matrices = torch.stack([basis[table[g]].T @ basis for g in range(order)])
        if all(float((character(matrices) - character(other)).abs().max()) > 1e-6 for other in found):
            found.append(matrices)
    # The trivial one first.
    return tuple(sorted(found, key=lambda matrices: (matrices.shape[1], -float(character(matrices).sum()))))


def _subgroups(product: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    """Cyclic ones, and what they generate together with those found before."""
    order = len(product)
    inverse = [row.index(0) for row in product]
    cyclic = {_generated(product, [g]) for g in range(order)}
    representatives: list[frozenset[int]] = []
    known: set[frozenset[int]] = set()

    def add(subgroup: frozenset[int]) -> None:
        if subgroup in known:
            return
        representatives.append(subgroup)
        known.update(frozenset(product[product[g][h]][inverse[g]] for h in subgroup) for g in range(order))

    for subgroup in sorted(cyclic, key=lambda elements: (len(elements), sorted(elements))):
        add(subgroup)
    for subgroup in representatives:  # grows on the way
        for other in sorted(cyclic, key=sorted):
            if not other <= subgroup:
                add(_generated(product, [*subgroup, *other]))
    return tuple(sorted((tuple(sorted(subgroup)) for subgroup in representatives), key=lambda s: (len(s), s)))


def _generated(product: list[list[int]], generators: list[int]) -> frozenset[int]:
    elements, waiting = {0}, [0]
    while waiting:
        row = product[waiting.pop()]
        new = {row[g] for g in generators} - elements
        elements |= new
        waiting += new
    return frozenset(elements)


def _cosets(product: list[list[int]], subgroup: tuple[int, ...]) -> tuple[int, ...]:
    left, chosen = set(range(len(product))), []
    for g in range(len(product)):
        if g in left:
            chosen.append(g)
            left -= {product[g][h] for h in subgroup}
    return tuple(chosen)
