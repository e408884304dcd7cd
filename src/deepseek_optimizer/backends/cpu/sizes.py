"""Memory of a native plan and its cache, computed from the graph without creating a context or threads."""

from __future__ import annotations

from collections.abc import Mapping

from ...graph.ir import Graph
from ...graph.planner import assign_slots
from ..base import CompileOptions
from . import native
from .compile import row_kind
from .lower import lower


class CpuSizes:
    """Implements `Sizes`."""

    def block_bytes(self, graph: Graph, kv_dtype: str) -> int:
        return native.block_bytes(graph.cache, kv_dtype)

    def state_bytes(self, graph: Graph) -> int:
        return native.state_bytes(graph.states)

    def buffer_bytes(
        self, graph: Graph, formats: Mapping[str, str], options: CompileOptions, tokens: int, logit_rows: int
    ) -> int:
        lowered = lower(graph, lambda name: row_kind(formats[name], options.activation), lambda name: formats[name])
        row_bytes = native.library().dso_row_bytes
        return sum(
            slot.repeat * int(row_bytes(native.SLOT_KINDS[slot.kind], slot.width)) * (logit_rows if slot.selected else tokens)
            for slot in assign_slots(lowered).slots
        )
