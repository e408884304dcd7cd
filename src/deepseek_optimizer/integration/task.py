"""Registers the task "conversational" with Transformers' pipelines, at the latest when these are imported.

Importing `transformers.pipelines` takes half a second and more, which who never asks for a pipeline should not pay. So where it
has not been imported yet, a finder waits for that import and registers the task behind it. It finds nothing itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

TASK = "conversational"
_PIPELINES = "transformers.pipelines"


class _WhenImported(MetaPathFinder):
    def __init__(self) -> None:
        self._asking = False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _PIPELINES or self._asking:
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
            _register(module)

        loader.exec_module = exec_module  # of this one loader: each import makes its own
        return spec


def _register(pipelines: Any) -> None:
    from .pipelines import ConversationalPipeline, Unloaded

    if TASK not in pipelines.PIPELINE_REGISTRY.supported_tasks:
        pipelines.PIPELINE_REGISTRY.register_pipeline(TASK, ConversationalPipeline, pt_model=Unloaded, type="text")


def register_task() -> None:
    """More than once does no harm."""
    if (loaded := sys.modules.get(_PIPELINES)) is not None and hasattr(loaded, "PIPELINE_REGISTRY"):
        _register(loaded)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())
