"""Uniform class prototypes: K unit vectors in R^D whose largest pairwise cosine is as small as possible.

`arrangements` holds those that mathematics gives, `known` the best values published and the coordinates that come with this
package, `search` the search for all others, with `starts`, `descent` and `contacts`; `bounds` and `certificate` say how good a
result is, `cache` keeps it, `files` read and write it.
"""

from .certificate import PrototypeCertificate, prototype_certificate
from .files import PROTOTYPE_DTYPES, load_prototypes, save_prototypes
from .uniform import search_prototypes, uniform_prototypes

__all__ = [
    "PROTOTYPE_DTYPES",
    "PrototypeCertificate",
    "load_prototypes",
    "prototype_certificate",
    "save_prototypes",
    "search_prototypes",
    "uniform_prototypes",
]
