"""Classes of modules with a native forward: subclasses of Transformers' own, so that `isinstance` and names stay true."""

from __future__ import annotations

import copyreg
import functools
from typing import Any


class _Made(type):
    """The class of these classes. `pickle` makes them anew, and goes on to the module, which says why it cannot be pickled."""


def native_class(base: type, module: Any) -> Any:
    """The class of `module`, with `base` before it."""
    kind: Any = type(module)
    return _made(base, kind)


@functools.cache
def _made(base: Any, kind: Any) -> type:
    return _Made(kind.__name__, (base, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _remade(made: type) -> Any:
    return _made, made.__bases__


copyreg.pickle(_Made, _remade)
