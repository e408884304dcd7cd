"""The names of installed backends: built-in ones, and entry points of other packages. Backends are not imported here.

A backend is an entry point of the group "deepseek_optimizer.backends". The built-in ones are also listed here, because the
package may run from a source tree, whose metadata is missing or outdated.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

from ..errors import BackendError

GROUP = "deepseek_optimizer.backends"
AUTO = "auto"  # instead of a name: the best backend that can run on the model's device
BUILT_IN = {
    "cpu": "deepseek_optimizer.backends.cpu:SPEC",
    "cuda": "deepseek_optimizer.backends.cuda:SPEC",
    "reference": "deepseek_optimizer.backends.reference:SPEC",
}


def names() -> tuple[str, ...]:
    """Returns the registered names, sorted. Raises BackendError if two packages register the same name."""
    return tuple(sorted(_installed(tuple(sys.path))))


def entry_of(name: str) -> EntryPoint | None:
    """Returns the entry point called `name`, or None. Other packages' metadata is not read for built-in names."""
    return EntryPoint(name, BUILT_IN[name], GROUP) if name in BUILT_IN else _installed(tuple(sys.path)).get(name)


def package_of(entry: EntryPoint) -> str:
    """Returns the name and version of an entry point's package as a phrase for messages; empty for built-in ones."""
    return "" if entry.dist is None else f" of the package {entry.dist.name} {entry.dist.version}"


@functools.lru_cache(maxsize=1)
def _installed(path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    """Returns the entry points of the group by name, cached for one value of `sys.path`, passed as `path`."""
    entries = {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
    for entry in entry_points(group=GROUP):
        first = entries.setdefault(entry.name, entry)
        if first.value != entry.value:
            raise BackendError(
                f"two backends are called {entry.name!r}: {first.value} and {entry.value}{package_of(entry)}; uninstall one of "
                "the packages"
            )
    return entries
