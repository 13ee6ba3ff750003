"""proac_cuda: the ProAC loss (prototype-anchor contrast) for segmentation networks, exact and fused."""

from . import compat, reference
from .autograd import ProACStats
from .backends import BackendStatus, available_backends
from .functional import proac_loss
from .module import ProACLoss
from .prototypes import load_prototypes, prototype_certificate, uniform_prototypes
from .version import __version__

__all__ = [
    "BackendStatus",
    "ProACLoss",
    "ProACStats",
    "__version__",
    "available_backends",
    "compat",
    "load_prototypes",
    "proac_loss",
    "prototype_certificate",
    "reference",
    "uniform_prototypes",
]
