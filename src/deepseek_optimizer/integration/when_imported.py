"""Work that waits for an import: who never needs a module of Transformers should not pay for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _WhenImported(MetaPathFinder):
    """Finds nothing itself: it asks the others, and lets the module's own loader run `work` behind its own."""

    def __init__(self, module: str, work: Callable[[Any], None]) -> None:
        self.module, self.work, self._asking = module, work, False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.module or self._asking:
            return None
        self._asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.work(module)

        loader.exec_module = exec_module  # of this one loader: each import makes its own
        return spec


def when_imported(module: str, name: str, work: Callable[[Any], None]) -> None:
    """Runs `work(module)` now where the module has been imported, or else right behind its import.

    Args:
        name: something of the module that `work` needs: without it the module is still being imported.
        work: more than once must do no harm.
    """
    if (loaded := sys.modules.get(module)) is not None and hasattr(loaded, name):
        work(loaded)
    elif not any(isinstance(f, _WhenImported) and (f.module, f.work) == (module, work) for f in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported(module, work))
