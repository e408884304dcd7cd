"""Classes of modules with a native forward: subclasses of Transformers' own, so that `isinstance` and names stay true."""

from __future__ import annotations

import functools
from typing import Any


def native_class(base: type, module: Any) -> Any:
    """The class of `module`, with `base` before it."""
    kind: Any = type(module)
    return _made(base, kind)


@functools.cache
def _made(base: Any, kind: Any) -> type:
    return type(kind.__name__, (base, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
