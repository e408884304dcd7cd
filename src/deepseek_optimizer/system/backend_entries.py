"""Which backends are installed, by name: the built-in ones, and entry points of other packages. None of them is imported.

A backend is an entry point of the group "deepseek_optimizer.backends". The built-in ones are listed here too, because the
package also runs from a source tree, whose metadata is missing or old.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

from ..errors import BackendError

GROUP = "deepseek_optimizer.backends"
AUTO = "auto"  # in place of a name: the best one that can run on the model's device
BUILT_IN = {
    "cpu": "deepseek_optimizer.backends.cpu:SPEC",
    "reference": "deepseek_optimizer.backends.reference:SPEC",
}


def names() -> tuple[str, ...]:
    """The registered names, sorted. Raises BackendError where two packages register the same one."""
    return tuple(sorted(_installed(tuple(sys.path))))


def entry_of(name: str) -> EntryPoint | None:
    """The entry point called `name`; None: there is none. Built-in ones are found without reading other packages' metadata."""
    return EntryPoint(name, BUILT_IN[name], GROUP) if name in BUILT_IN else _installed(tuple(sys.path)).get(name)


def package_of(entry: EntryPoint) -> str:
    """The name and version of the package that an entry point is of, for messages; empty for built-in ones."""
    return "" if entry.dist is None else f" of the package {entry.dist.name} {entry.dist.version}"


@functools.lru_cache(maxsize=1)
def _installed(path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    """Entry points of the group by name; read again when `sys.path` has changed, which `path` is."""
    found = {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
    for entry in entry_points(group=GROUP):
        known = found.setdefault(entry.name, entry)
        if known.value != entry.value:
            raise BackendError(
                f"two backends are called {entry.name!r}: {known.value} and {entry.value}{package_of(entry)}; uninstall one of "
                "the packages"
            )
    return found
