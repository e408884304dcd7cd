"""Classes of modules with a native forward: subclasses of Transformers' own, so that `isinstance` and names stay true. And
which modules are alike, so that one of them is compared with its native forward for all."""

from __future__ import annotations

import copyreg
import functools
from typing import Any

from torch import nn

_OWN = frozenset(vars(nn.Module()))  # attributes of every module


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


def kind_of(module: nn.Module) -> tuple[Any, ...]:
    """What is equal for modules that connect their parts in the same way: class, parts and settings.

    Settings may differ from layer to layer, as Gemma 3n's `activation_sparsity` does. Those that are not numbers or names count
    as equal if they are the same object.
    """
    plain = bool, int, float, str, type(None)
    settings = {name: value for name, value in vars(module).items() if name not in _OWN}
    return (
        type(module), *((name, repr(child)) for name, child in module.named_children()),
        *((name, value if isinstance(value, plain) else (type(value), id(value))) for name, value in sorted(settings.items())),
    )  # fmt: skip
