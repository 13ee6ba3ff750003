"""Lower bounds on the largest cosine between any two of K unit vectors in R^D.

All of them bound the largest *signed* cosine. The Welch bounds do not: they bound the largest absolute value of a cosine, which
an antipodal pair meets without any two vectors being close. What their argument says about signed cosines is contained in
Levenshtein's bound (its polynomials of degree 1, 2 and 3 use the same first and second moments), so it loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import torch
from numpy.typing import NDArray


def best_lower_bound(num_points: int, dimension: int) -> tuple[float, str]:
    """The largest lower bound known here for K = `num_points` unit vectors in R^D, D = `dimension`, and its name.

    K >= 2 and D >= 1. The bounds: "simplex", "Rankin", "circle" (exact, D = 2), "Fejes Toth" (D = 3), "Levenshtein", and
    "pigeonhole" (1.0: more than two unit vectors in R^1).
    """
    if dimension == 1:
        return (-1.0, "simplex") if num_points == 2 else (1.0, "pigeonhole")
    if num_points <= dimension + 1:
        # |sum of the vectors|^2 >= 0 makes the mean of the K (K - 1) cosines at least -1 / (K - 1).
        return -1.0 / (num_points - 1), "simplex"
    if num_points <= 2 * dimension:
        return 0.0, "Rankin"
    if dimension == 2:
        return math.cos(2 * math.pi / num_points), "circle"
    bounds = [(_levenshtein(num_points, dimension), "Levenshtein")]
    if dimension == 3:
        bounds.append((_fejes_toth(num_points), "Fejes Toth"))
    return max(bounds)


def _fejes_toth(num_points: int) -> float:
    """L. Fejes Toth 1943: among K points on the sphere in R^3 two are within the side of a triangle of known area."""
    angle = math.pi * num_points / (6.0 * (num_points - 2))
    return 0.5 / math.sin(angle) ** 2 - 1.0


def _levenshtein(num_points: int, dimension: int) -> float:
    """The cosine s at which Levenshtein's bound on the number of points, L_m(D, s), equals K. Needs K > 2D and D >= 3.

    For every degree m there is an interval of cosines on which K <= L_m(D, s) holds for codes of largest cosine s; L_m rises
    on it from one Delsarte-Goethals-Seidel number to the next, which tells the degree that belongs to K.
    Source: V. I. Levenshtein, Universal bounds for codes and designs, Handbook of Coding Theory, 1998, section 4.
    """
    degree = 1
    while _delsarte_goethals_seidel(dimension, degree + 1) < num_points:
        degree += 1
    half = (degree + 1) // 2
    if degree % 2:
        low, high = _largest_jacobi_zero(half - 1, dimension, 1, 1), _largest_jacobi_zero(half, dimension, 1, 0)
    else:
        low, high = _largest_jacobi_zero(half, dimension, 1, 0), _largest_jacobi_zero(half, dimension, 1, 1)
    for _ in range(100):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        if _levenshtein_number(dimension, degree, middle) < num_points:
            low = middle
        else:
            high = middle
    return low


def _delsarte_goethals_seidel(dimension: int, degree: int) -> int:
    """The least number of points of a spherical design of strength `degree`."""
    half = degree // 2
    if degree % 2:
        return 2 * math.comb(dimension + half - 1, dimension - 1)
    return math.comb(dimension + half - 1, dimension - 1) + math.comb(dimension + half - 2, dimension - 1)


def _levenshtein_number(dimension: int, degree: int, cosine: float) -> float:
    """L_m(D, s): no more than so many unit vectors in R^D have all cosines <= s (for s in the interval of degree m)."""
    half = (degree + 1) // 2
    values = _gegenbauer(dimension, half + 1, cosine)
    here, after = values[half], values[half + 1]
    if degree % 2:
        before = values[half - 1]
        count = math.comb(half + dimension - 3, half - 1)
        first = (2 * half + dimension - 3) / (dimension - 1)
        return count * (first - (before - here) / ((1.0 - cosine) * here))
    count = math.comb(half + dimension - 2, half)
    first = (2 * half + dimension - 1) / (dimension - 1)
    return count * (first - (1.0 + cosine) * (here - after) / ((1.0 - cosine) * (here + after)))


def _gegenbauer(dimension: int, highest: int, cosine: float) -> list[float]:
    """The zonal polynomials of degree 0 to `highest` of the sphere in R^D at `cosine`, each 1 at cosine 1."""
    values = [1.0, cosine]
    for degree in range(1, highest):
        following = (2 * degree + dimension - 2) * cosine * values[degree] - degree * values[degree - 1]
        values.append(following / (degree + dimension - 2))
    return values


def _largest_jacobi_zero(degree: int, dimension: int, extra_left: int, extra_right: int) -> float:
    """The largest zero of the Jacobi polynomial with parameters (D - 3)/2 + extra_left, (D - 3)/2 + extra_right.

    The zeros are the eigenvalues of the tridiagonal matrix of the three-term recurrence (Golub and Welsch 1969).
    """
    if degree == 0:
        return -1.0  # by convention: the first interval of cosines begins here
    left, right = (dimension - 3) / 2 + extra_left, (dimension - 3) / 2 + extra_right
    total = left + right
    matrix = torch.zeros(degree, degree, dtype=torch.float64, device="cpu")
    for n in range(degree):
        matrix[n, n] = (right**2 - left**2) / ((2 * n + total) * (2 * n + total + 2))
    for n in range(1, degree):
        squared = 4 * n * (n + left) * (n + right) * (n + total)
        squared /= (2 * n + total) ** 2 * (2 * n + total + 1) * (2 * n + total - 1)
        matrix[n, n - 1] = matrix[n - 1, n] = math.sqrt(squared)
    return float(torch.linalg.eigvalsh(matrix)[-1])


def linear_programming_bound(num_points: int, dimension: int) -> float | None:
    """Delsarte's bound: the largest cosine s at which linear programming proves that K vectors cannot all have cosines <= s.

    K > 2D, D >= 3. None where scipy, which solves the programs, is not installed. Rounded down so that it stays a bound.
    Source: P. Delsarte, J. M. Goethals, J. J. Seidel, Spherical codes and designs, 1977.
    """
    try:
        from scipy.optimize import linprog
    except ImportError:
        return None
    low, high = _levenshtein(num_points, dimension), 1.0
    if _most_points(dimension, low + _RESOLUTION, linprog) >= num_points:
        return low
    step = 0.01
    high = low + step
    while _most_points(dimension, high, linprog) < num_points:
        low, high = high, high + step
    while high - low > _RESOLUTION:
        middle = 0.5 * (low + high)
        if _most_points(dimension, middle, linprog) < num_points:
            low = middle
        else:
            high = middle
    return low


_RESOLUTION = 1e-7
_DEGREE = 24
_GRID = 1000


def _most_points(dimension: int, cosine: float, linprog: Callable[..., Any]) -> float:
    """No more than so many unit vectors in R^D have all cosines <= `cosine`.

    If 1 + sum c_k G_k(t) <= 0 for -1 <= t <= `cosine`, all c_k >= 0, then 1 + sum c_k bounds the number. The program asks this
    on a grid (Chebyshev's points, which are dense at the ends); what the result exceeds 0 by between them is taken off again.
    """
    angles = numpy.linspace(0.0, math.pi, _GRID)
    grid = -1.0 + (cosine + 1.0) * 0.5 * (1.0 - numpy.cos(angles))
    values = _gegenbauer_matrix(dimension, grid)
    solved = linprog(numpy.ones(_DEGREE), A_ub=values, b_ub=-numpy.ones(_GRID), bounds=(0, None), method="highs")
    if solved.status != 0:
        return math.inf
    coefficients = numpy.maximum(solved.x, 0.0)
    fine = -1.0 + (cosine + 1.0) * 0.5 * (1.0 - numpy.cos(numpy.linspace(0.0, math.pi, 20 * _GRID)))
    excess = 1.0 + _gegenbauer_matrix(dimension, fine) @ coefficients
    # Between two points of the fine grid, too: the second difference bounds what a smooth function adds.
    over = max(0.0, float(excess.max()) + float(numpy.abs(numpy.diff(excess, 2)).max()) + 1e-12)
    return math.inf if over >= 1.0 else (1.0 + float(coefficients.sum()) - over) / (1.0 - over)


def _gegenbauer_matrix(dimension: int, cosines: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """(cosines, degree): the zonal polynomials of degree 1 to `_DEGREE`."""
    values = [numpy.ones_like(cosines), cosines]
    for degree in range(1, _DEGREE):
        following = (2 * degree + dimension - 2) * cosines * values[degree] - degree * values[degree - 1]
        values.append(following / (degree + dimension - 2))
    return numpy.stack(values[1:], axis=1)
