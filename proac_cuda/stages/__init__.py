"""What crosses between the stages of the loss: K-vectors, and how those of disjoint sets of pixels merge exactly.

A call runs (0) `select_negatives`, only for sampled sets; (i) `class_statistics`; (ii) `positive_sums`; `reduce_loss`;
and in backward (iii) `loss_gradients`. Between (i) and (ii), and after (ii), the vectors below may be merged over chunks
of pixels or over the ranks of a process group; where they are not, `loss_forward` is (i), (ii) and `reduce_loss` in one.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of `statistics`, (6, K): what stage (i) finds for each class.
LOG_Z = 0  #: log sum_{j in N_k} w_j exp(S_kj); -inf where N_k is empty
WEIGHT = 1  #: W_k = sum_{P_k} w_i
NEGATIVE_WEIGHT = 2  #: sum_{j in N_k} w_j
POSITIVE_SUM = 3  #: sum_{P_k} w_i S_ki
PIXEL_LOSS_SUM = 4  #: sum_{P_k} w_i (logsumexp_c S_ci - S_ki); 0 unless the pixel-anchored twin was asked for
HARDEST_NEGATIVE = 5  #: max_{j in N_k} S_kj; -inf where N_k is empty or diagnostics were not asked for
NUM_STATISTICS = 6

# Rows of `positive_sums`, (2, K): what stage (ii) finds, given the merged statistics.
SOFTPLUS_SUM = 0  #: sum_{P_k} w_i softplus(log Z_k - S_ki) = W_k L_k
SIGMOID_SUM = 1  #: sum_{P_k} w_i sigmoid(log Z_k - S_ki) = W_k T_k
NUM_POSITIVE_SUMS = 2

# How `reduction` travels through the ops: as PyTorch's own losses number it.
NONE, MEAN, SUM = 0, 1, 2
REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}


def compute_dtype(features: Tensor) -> torch.dtype:
    """What the stages compute in: float64 for float64 features, else float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def merge_statistics(parts: Tensor) -> Tensor:
    """Statistics of the union of disjoint sets of pixels: (parts, 6, K) to (6, K)."""
    merged = parts.sum(0)
    merged[LOG_Z] = torch.logsumexp(parts[:, LOG_Z], 0)
    merged[HARDEST_NEGATIVE] = parts[:, HARDEST_NEGATIVE].amax(0)
    return merged


def merge_positive_sums(parts: Tensor) -> Tensor:
    """Positive sums of the union of disjoint sets of pixels: (parts, 2, K) to (2, K)."""
    return parts.sum(0)
