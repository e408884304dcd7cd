"""The reference backend: any graph, with plain torch ops, in any dtype on any device.

It is the oracle for rules, kernels and models, and what serves where there is no native build.
"""

from .backend import ReferenceBackend

__all__ = ["ReferenceBackend"]
