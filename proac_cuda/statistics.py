"""What a call tells of each class beside the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import stages
from .backends.reference import contrast_log_z
from .stages.autograd import Options, Outputs


class ProACStats(NamedTuple):
    """What the loss saw of each class; detached tensors, of shape (K,) but for the last, float32 (float64 for float64).

    Cosines of a class that is absent, or has no negatives, are NaN.
    """

    weight: Tensor  #: W_k, the sum of the weights of its pixels; 0 where absent
    loss: Tensor  #: L_k; 0 where absent
    log_z: Tensor  #: log Z_k, as the loss has it; -inf without negatives
    mean_positive_cosine: Tensor  #: weighted mean of the cosines of its pixels with its prototype
    hardest_negative_cosine: Tensor  #: the largest cosine of a member of N_k with its prototype
    invalid_labels: Tensor  #: int64, a scalar: pixels ignored for an invalid label or weight


def make_stats(outputs: Outputs, options: Options) -> ProACStats:
    """The statistics of a call in the form that users see."""
    statistics, temperature = outputs.statistics, options.temperature
    weight, hardest = statistics[stages.WEIGHT], statistics[stages.HARDEST_NEGATIVE]
    present = weight > 0
    some_weight = torch.where(present, weight, 1)
    return ProACStats(
        weight=weight.clone(),
        loss=torch.where(present, outputs.sums[stages.SOFTPLUS_SUM] / some_weight, 0),
        log_z=contrast_log_z(statistics, options.negative_mean).clone(),
        mean_positive_cosine=torch.where(
            present, statistics[stages.POSITIVE_SUM] / some_weight * temperature, torch.nan
        ),
        hardest_negative_cosine=torch.where(present & (hardest > -torch.inf), hardest * temperature, torch.nan),
        invalid_labels=outputs.diagnostics[0] + outputs.diagnostics[2],
    )
