"""Arrangements that need no search: closed forms, orbits, shells of lattices, strongly regular graphs.

Each is built from its mathematics, in integers as far as that goes, and turned into coordinates last. Largest cosines and
sources stand in `best_known.csv`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Arrangement(NamedTuple):
    """A known one, by its name and how it is made."""

    name: str
    make: Callable[[], Tensor]  # (K, R) float64 unit rows, R <= D


def arrangement(num_points: int, dimension: int) -> Arrangement | None:
    """The arrangement known for K = `num_points` unit vectors in R^D, D = `dimension`, or None."""
    if num_points == 1:
        return Arrangement("one vector", lambda: torch.ones(1, 1, dtype=torch.float64, device="cpu"))
    if num_points <= dimension + 1:
        return Arrangement("regular simplex", lambda: _simplex(num_points))
    if num_points <= 2 * dimension:
        whole = num_points == 2 * dimension
        return Arrangement(
            "cross-polytope" if whole else "antipodal pairs of a cross-polytope", lambda: _antipodal_pairs(num_points)
        )
    if dimension == 2:
        return Arrangement("regular polygon", lambda: _circle(num_points))
    return _NAMED.get((num_points, dimension))


def named_sizes() -> Iterable[tuple[int, int]]:
    """(K, D) of the arrangements with K > 2D > 4."""
    return _NAMED.keys()


# For every K and D


def _simplex(num_points: int) -> Tensor:
    """(K, K - 1): the basis vectors of R^K less their mean, in coordinates of the hyperplane in which they lie.

    The coordinates are those of Helmert's basis: its vector j is (1, ..., 1, -j, 0, ..., 0) / sqrt(j (j + 1)), j ones.
    """
    rank = num_points - 1
    j = torch.arange(1, num_points, dtype=torch.float64, device="cpu")
    basis = torch.ones(num_points, rank, dtype=torch.float64, device="cpu").triu()
    basis[torch.arange(1, num_points, device="cpu"), torch.arange(rank, device="cpu")] = -j
    return basis / (j * (j + 1)).sqrt() * math.sqrt(num_points / rank)


def _antipodal_pairs(num_points: int) -> Tensor:
    """(K, ceil(K / 2)): vectors 2i and 2i + 1 are +e_i and -e_i; every other pair is orthogonal.

    Of all subsets of the cross-polytope with K vectors this one has the most antipodal pairs. It treats the classes alike
    (but for the last one, if K is odd), and its sum is zero (likewise).
    """
    rank = (num_points + 1) // 2
    axes = torch.eye(rank, dtype=torch.float64, device="cpu")
    return torch.stack([axes, -axes], dim=1).reshape(2 * rank, rank)[:num_points]


def _circle(num_points: int) -> Tensor:
    angles = torch.arange(num_points, dtype=torch.float64, device="cpu") * (2 * math.pi / num_points)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


# Tools


def _unit(rows: Tensor) -> Tensor:
    norms: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / norms


def _rows(vectors: Iterable[Iterable[float]]) -> Tensor:
    return torch.tensor([list(vector) for vector in vectors], dtype=torch.float64, device="cpu")


def _from_gram(gram: Tensor) -> Tensor:
    """(K, R): unit rows with these cosines. R, the rank, is found on the way.

    Cholesky's factorisation that passes over rows which depend on those before. Unlike eigenvectors, which an eigenvalue of
    high multiplicity leaves to chance, it gives one answer.
    """
    rest, columns = gram.clone(), []
    for row in range(len(gram)):
        pivot = float(rest[row, row])
        if pivot > 1e-9:
            column = rest[:, row] / math.sqrt(pivot)
            columns.append(column)
            rest -= torch.outer(column, column)
    return _unit(torch.stack(columns, dim=1))


def _from_graph(adjacent: Tensor) -> Tensor:
    """A strongly regular graph's vertices, projected to the eigenspace of its smallest eigenvalue s.

    Of valency k on v vertices: the cosine is s / k where two vertices are adjacent and -(s + 1) / (v - k - 1) elsewhere.
    """
    vertices = len(adjacent)
    valency = int(adjacent[0].sum())
    square = adjacent @ adjacent
    first, second = adjacent[0].nonzero()[0], (adjacent[0] + torch.eye(vertices, device="cpu")[0] == 0).nonzero()[0]
    common, others = int(square[0, first]), int(square[0, second])  # neighbours that two vertices share
    difference = common - others
    smallest = (difference - math.sqrt(difference**2 + 4 * (valency - others))) / 2
    unequal = 1.0 - torch.eye(vertices, dtype=torch.float64, device="cpu")
    gram = torch.eye(vertices, dtype=torch.float64, device="cpu") + adjacent * (smallest / valency)
    gram += (unequal - adjacent) * (-(smallest + 1) / (vertices - valency - 1))
    return _from_gram(gram)


def _graph(vertices: list[frozenset[int]], adjacent: Callable[[frozenset[int], frozenset[int]], bool]) -> Tensor:
    return _rows([float(left != right and adjacent(left, right)) for right in vertices] for left in vertices)


def _at_cosine(points: Tensor, number: int, cosine: float) -> Tensor:
    """The points at that cosine to one of them, projected orthogonally to it: an arrangement in one dimension less."""
    pole = points[number]
    cosines = points @ pole
    chosen = points[(cosines - cosine).abs() < 1e-9]
    projected = _unit(chosen - cosine * pole)
    return _from_gram(projected @ projected.T)


def _nearest(points: Tensor) -> Tensor:
    """The derived code: points that touch one of them. The largest cosine is s / (1 + s) instead of s.

    Source: P. Delsarte, J.-M. Goethals, J. J. Seidel, Spherical codes and designs, 1977, section 8.
    """
    return _at_cosine(points, 0, float((points[1:] @ points[0]).max()))


# Roots of the lattices D_n, E_6, E_7, E_8


def _roots_d(dimension: int) -> Tensor:
    roots = []
    for first, second in itertools.combinations(range(dimension), 2):
        for signs in itertools.product((1.0, -1.0), repeat=2):
            root = [0.0] * dimension
            root[first], root[second] = signs
            roots.append(root)
    return _unit(_rows(roots))


def _roots_e8() -> Tensor:
    halves = [signs for signs in itertools.product((0.5, -0.5), repeat=8) if sum(s < 0 for s in signs) % 2 == 0]
    return torch.cat([_roots_d(8), _unit(_rows(halves))])


def _roots_orthogonal(roots: Tensor, count: int) -> Tensor:
    """The roots of E_8 that are orthogonal to A_1 (count = 1: E_7) or to A_2 (count = 2: E_6)."""
    first = roots[0]
    second = roots[(roots @ first - 0.5).abs() < 1e-9][0]
    chosen = (roots @ first).abs() < 1e-9
    if count == 2:
        chosen &= (roots @ second).abs() < 1e-9
    return _from_gram(roots[chosen] @ roots[chosen].T)


# The 600-cell and the icosahedron


def _icosahedron() -> Tensor:
    golden = (1 + math.sqrt(5)) / 2
    return _unit(_rows(_rotate((0.0, a, b * golden), k) for a in (1, -1) for b in (1, -1) for k in range(3)))


def _rotate(vector: tuple[float, ...], places: int) -> tuple[float, ...]:
    return vector[places:] + vector[:places]


def _cell_24() -> Tensor:
    return _roots_d(4)


def _cell_600() -> Tensor:
    """The units of the icosian ring: 24 of Hurwitz's, and the 96 even permutations of (0, 1, golden ratio, its inverse) / 2."""
    golden = (1 + math.sqrt(5)) / 2
    points = [[sign * float(k == axis) for k in range(4)] for axis in range(4) for sign in (1.0, -1.0)]
    points += [list(signs) for signs in itertools.product((0.5, -0.5), repeat=4)]
    for order in itertools.permutations(range(4)):
        if sum(order[i] > order[j] for i, j in itertools.combinations(range(4), 2)) % 2:
            continue
        for a, b, c in itertools.product((0.5, -0.5), repeat=3):
            values = (0.0, a, b * golden, c / golden)
            points.append([values[k] for k in order])
    return _unit(_rows(points))


# Strongly regular graphs without triangles


def _petersen() -> Tensor:
    pairs = [frozenset(pair) for pair in itertools.combinations(range(5), 2)]
    return _from_graph(_graph(pairs, frozenset.isdisjoint))


def _clebsch() -> Tensor:
    """Words of even weight in five bits, adjacent where they differ in four of them."""
    words = [frozenset(w) for size in (0, 2, 4) for w in itertools.combinations(range(5), size)]
    return _from_graph(_graph(words, lambda left, right: len(left ^ right) == 4))


def _hoffman_singleton() -> Tensor:
    """Robertson's pentagons P_h and pentagrams Q_i: vertex j of P_h is joined to vertex h i + j of Q_i."""
    adjacent = torch.zeros(50, 50, dtype=torch.float64, device="cpu")
    for h, j in itertools.product(range(5), repeat=2):
        neighbours = [5 * h + (j + 1) % 5] + [25 + 5 * i + (h * i + j) % 5 for i in range(5)]
        adjacent[5 * h + j, neighbours] = 1.0
        adjacent[25 + 5 * h + j, 25 + 5 * h + (j + 2) % 5] = 1.0
    return _from_graph(torch.maximum(adjacent, adjacent.T))


def _golay_words() -> list[int]:
    """The extended binary Golay code: the quadratic residues modulo 23 with a parity bit generate it."""
    residues = {x * x % 23 for x in range(1, 23)}
    words = {0}
    for shift in range(23):
        word = sum(1 << ((x + shift) % 23) for x in residues)
        word |= (word.bit_count() % 2) << 23
        if word not in words:
            words |= {word ^ other for other in words}
    return sorted(words)


def _nordstrom_robinson() -> Tensor:
    """The Nordstrom-Robinson code, shortened twice: 64 words of 14 bits that differ in 6, 8 or 10, as signs.

    Its 256 words of 16 bits are those of the Golay code that meet an octad in nothing, or in two places of which one is fixed.
    """
    words = _golay_words()
    octad = next(word for word in words if word.bit_count() == 8)
    inside = [k for k in range(24) if octad >> k & 1]
    outside = [k for k in range(24) if not octad >> k & 1]
    pairs = {0, *(1 << inside[0] | 1 << k for k in inside[1:])}
    kept = [word for word in words if word & octad in pairs and not word & (1 << outside[0] | 1 << outside[1])]
    return _unit(_rows([1.0 - 2.0 * (word >> k & 1) for k in outside[2:]] for word in kept))


def _half_cube(dimension: int) -> Tensor:
    """Every other corner of a cube."""
    corners = itertools.product((1.0, -1.0), repeat=dimension)
    return _unit(_rows(corner for corner in corners if math.prod(corner) > 0))


def _hexads() -> list[frozenset[int]]:
    """The 77 blocks of the Steiner system S(3, 6, 22): octads through two points, without these."""
    octads = [word for word in _golay_words() if word.bit_count() == 8]
    ends = (1 << 22) | (1 << 23)
    return [frozenset(k for k in range(22) if word >> k & 1) for word in octads if word & ends == ends]


def _m22_graph() -> Tensor:
    return _from_graph(_graph(_hexads(), frozenset.isdisjoint))


def _gewirtz() -> Tensor:
    return _from_graph(_graph([block for block in _hexads() if 0 not in block], frozenset.isdisjoint))


def _higman_sims() -> Tensor:
    """A vertex joined to 22 points, these to the blocks through them, and blocks to disjoint blocks."""
    blocks = _hexads()
    vertices = [frozenset[int](), *(frozenset([point]) for point in range(22)), *blocks]

    def adjacent(left: frozenset[int], right: frozenset[int]) -> bool:
        small, large = sorted((left, right), key=len)
        if len(small) == 6:
            return small.isdisjoint(large)
        return len(large) == 1 if not small else len(large) == 6 and small <= large

    return _from_graph(_graph(vertices, adjacent))


# The Leech lattice


def _leech_552() -> Tensor:
    """276 equiangular lines in R^23: minimal vectors of the Leech lattice at inner product 3 to a vector w of norm 6.

    In the coordinates that are sqrt(8) times too large w = (5, 1, ..., 1), and a minimal vector of norm 32 has product 24.
    """
    words = _golay_words()
    special = torch.ones(24, dtype=torch.float64, device="cpu")
    special[0] = 5.0
    minimal = [
        _with(24, {i: a, j: b}) for i, j in itertools.combinations(range(24), 2) for a in (4, -4) for b in (4, -4)
    ]
    for word in words:
        places = [k for k in range(24) if word >> k & 1]
        if len(places) == 8:
            # At most two minus signs can reach the product; their number is even.
            for negative in [(), *itertools.combinations(places, 2)]:
                minimal.append(_with(24, {k: -2.0 if k in negative else 2.0 for k in places}))
        for odd in range(24):
            # 1 everywhere and -3 at one place, with the signs of a word changed
            vector = [1.0] * 24
            vector[odd] = -3.0
            for k in places:
                vector[k] = -vector[k]
            minimal.append(vector)
    vectors = torch.tensor(minimal, dtype=torch.float64, device="cpu")
    chosen = vectors[vectors @ special == 24.0]
    projected = _unit(chosen - special * (24.0 / 48.0))
    return _from_gram(projected @ projected.T)


def _with(length: int, values: dict[int, float]) -> list[float]:
    return [values.get(k, 0.0) for k in range(length)]


def _mclaughlin_275() -> Tensor:
    """The lines' vectors at cosine 1/5 to one of them: the vertices of the McLaughlin graph."""
    return _at_cosine(_leech_552(), 0, 1 / 5)


def _mclaughlin_162() -> Tensor:
    return _nearest(_mclaughlin_275())


def _mclaughlin_112() -> Tensor:
    return _at_cosine(_mclaughlin_275(), 0, -1 / 4)


# Real mutually unbiased bases


def _kerdock_288() -> Tensor:
    """Nine bases of R^16 and their negatives, cosine 1/4 between them: one of axes, eight of characters times signs.

    The signs are quadratic forms in four bits; the difference of any two must have rank 4, that is an odd Pfaffian. There are
    eight such forms at most (a Kerdock set), and going through the 64 alternating ones finds them.
    """
    pairs = list(itertools.combinations(range(4), 2))
    forms: list[int] = []
    _extend(forms)
    bits = [[x >> k & 1 for k in range(4)] for x in range(16)]
    points = [[sign * float(k == axis) for k in range(16)] for axis in range(16) for sign in (1.0, -1.0)]
    for form in forms:
        chosen = [pair for n, pair in enumerate(pairs) if form >> n & 1]
        for character, sign in itertools.product(bits, (0.25, -0.25)):
            exponents = [
                sum(x[i] * x[j] for i, j in chosen) + sum(a * b for a, b in zip(character, x, strict=True))
                for x in bits
            ]
            points.append([sign * (-1.0) ** exponent for exponent in exponents])
    return _rows(points)


def _extend(forms: list[int]) -> bool:
    """Add alternating forms of four bits, as six coefficients 01, 02, 03, 12, 13, 23, until there are eight."""
    if len(forms) == 8:
        return True
    for form in range(forms[-1] + 1 if forms else 0, 64):
        if all(_pfaffian(form ^ other) for other in forms):
            forms.append(form)
            if _extend(forms):
                return True
            forms.pop()
    return False


def _pfaffian(form: int) -> int:
    a = [form >> n & 1 for n in range(6)]
    return (a[0] * a[5] + a[1] * a[4] + a[2] * a[3]) % 2


_NAMED = {
    (12, 3): Arrangement("icosahedron", _icosahedron),
    (10, 4): Arrangement("Petersen graph's eigenspace", _petersen),
    (24, 4): Arrangement("24-cell", _cell_24),
    (120, 4): Arrangement("600-cell", _cell_600),
    (16, 5): Arrangement("Clebsch graph's eigenspace", _clebsch),
    (32, 6): Arrangement("half cube", lambda: _half_cube(6)),
    (40, 5): Arrangement("roots of D5", lambda: _roots_d(5)),
    (27, 6): Arrangement(
        "Schlaefli graph's eigenspace", lambda: _at_cosine(_at_cosine(_roots_e8(), 0, 1 / 2), 0, 1 / 3)
    ),
    (72, 6): Arrangement("roots of E6", lambda: _roots_orthogonal(_roots_e8(), 2)),
    (56, 7): Arrangement("28 equiangular lines", lambda: _at_cosine(_roots_e8(), 0, 1 / 2)),
    (126, 7): Arrangement("roots of E7", lambda: _roots_orthogonal(_roots_e8(), 1)),
    (240, 8): Arrangement("roots of E8", _roots_e8),
    (64, 14): Arrangement("Nordstrom-Robinson code, shortened twice", _nordstrom_robinson),
    (42, 14): Arrangement(
        "part of the Nordstrom-Robinson code", lambda: _at_cosine(_nearest(_kerdock_288()), 0, -1 / 3)
    ),
    (70, 14): Arrangement(
        "twice derived from Kerdock code's unbiased bases", lambda: _nearest(_nearest(_kerdock_288()))
    ),
    (128, 15): Arrangement("Nordstrom-Robinson code, shortened once", lambda: _nearest(_kerdock_288())),
    (288, 16): Arrangement("Kerdock code's unbiased bases", _kerdock_288),
    (45, 19): Arrangement("derived from the Gewirtz graph's eigenspace", lambda: _nearest(_gewirtz())),
    (60, 19): Arrangement(
        "twice derived from the McLaughlin graph's 112", lambda: _nearest(_nearest(_mclaughlin_112()))
    ),
    (72, 19): Arrangement(
        "twice derived from the McLaughlin graph's 162", lambda: _nearest(_nearest(_mclaughlin_162()))
    ),
    (60, 20): Arrangement("derived from the M22 graph's eigenspace", lambda: _nearest(_m22_graph())),
    (81, 20): Arrangement("derived from the McLaughlin graph's 112", lambda: _nearest(_mclaughlin_112())),
    (105, 20): Arrangement("derived from the McLaughlin graph's 162", lambda: _nearest(_mclaughlin_162())),
    (56, 20): Arrangement("Gewirtz graph's eigenspace", _gewirtz),
    (50, 21): Arrangement("Hoffman-Singleton graph's eigenspace", _hoffman_singleton),
    (77, 21): Arrangement("M22 graph's eigenspace", _m22_graph),
    (112, 21): Arrangement("first subconstituent of the McLaughlin graph", _mclaughlin_112),
    (162, 21): Arrangement("second subconstituent of the McLaughlin graph", _mclaughlin_162),
    (100, 22): Arrangement("Higman-Sims graph's eigenspace", _higman_sims),
    (275, 22): Arrangement("McLaughlin graph's eigenspace", _mclaughlin_275),
    (552, 23): Arrangement("276 equiangular lines", _leech_552),
}
