"""The reference backend: runs any graph with plain torch ops, in any dtype on any device.

It is the reference for fusion rules, kernels and models, and the fallback where there is no native build.
"""

from ..registry import FALLBACK, BackendSpec
from .backend import ReferenceBackend, ReferenceSizes

__all__ = ["SPEC", "ReferenceBackend"]

SPEC = BackendSpec("reference", lambda device, settings: ReferenceBackend(device), ReferenceSizes, priority=FALLBACK)
