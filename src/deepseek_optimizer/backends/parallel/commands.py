"""What every process but the first does for the messages that it gets, whichever way the model is divided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ...graph.ir import Graph
from ..base import Plan
from ..cpu import CpuBackend
from ..qualities import Quality

Backend = TypeVar("Backend", bound=CpuBackend)


@dataclass(frozen=True)
class OwnPart:
    """What a process has of a model.

    Attributes:
        graph: of the whole model.
        fingerprint: a hash of the part; its argument: whether of whole weights.
        compile: compiles the plan of a quality for the part.
    """

    graph: Graph
    fingerprint: Callable[[bool], str]
    compile: Callable[[Quality], Plan]


class Commands(Generic[Backend]):
    """One method per message; stores have the numbers that all processes know them by."""

    def __init__(self, backend: Backend, part: OwnPart) -> None:
        self._backend, self._part = backend, part
        self._stores: dict[int, Any] = {}

    def fingerprint(self, whole: bool) -> str:
        return self._part.fingerprint(whole)

    def compile(self, quality: Quality) -> None:
        self._part.compile(quality)

    def drop_store(self, number: int) -> None:
        self._stores.pop(number, None)
