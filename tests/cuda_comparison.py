"""The CUDA kernels' own source, run on the CPU: its comparison with the reference, and the orders of threads to try."""

from __future__ import annotations

import functools

import stage_comparison
from cuda_on_cpu import stages as kernels

ORDERS = [(0, 1), (1, 1), *((2, seed) for seed in range(1, 6))]  # ascending, descending, five random ones

compare = functools.partial(stage_comparison.compare, kernels)
