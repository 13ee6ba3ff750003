"""proac_cuda: the ProAC loss (prototype-anchor contrast) for segmentation networks, exact and fused."""

from . import compat, diagnostics, distributed, reference
from .backends import BackendStatus, available_backends
from .functional import proac_loss
from .module import ProACLoss
from .prototypes import load_prototypes, prototype_certificate, save_prototypes, uniform_prototypes
from .regularizer import ProACRegularizer, ProjectionHead
from .statistics import ProACStats
from .version import __version__

__all__ = [
    "BackendStatus",
    "ProACLoss",
    "ProACRegularizer",
    "ProACStats",
    "ProjectionHead",
    "__version__",
    "available_backends",
    "compat",
    "diagnostics",
    "distributed",
    "load_prototypes",
    "proac_loss",
    "prototype_certificate",
    "reference",
    "save_prototypes",
    "uniform_prototypes",
]
