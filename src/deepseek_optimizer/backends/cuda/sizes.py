"""Memory that plans and caches take, computed from the graph alone."""

from __future__ import annotations

from collections.abc import Mapping

from ...graph.analysis import weight_shapes
from ...graph.ir import CacheSpec, Graph
from ...graph.planner import Slot, assign_slots
from ...quant.tiles import tile_counts
from ..base import CompileOptions
from .buckets import MOST_ROWS, rows_bucket
from .division import attention_scratch_bytes, product_scratch_bytes
from .matrices import LAYOUTS
from .store import KV_DTYPES, layer_offsets
from .supported import check_cache

_VALUE_BYTES = 4  # values are float32; products round their rows themselves


def value_slots(graph: Graph) -> list[Slot]:
    """The buffers of a plan, without the logits."""
    planned = assign_slots(graph)
    logits = {planned.slot_of[value] for node in graph.nodes if node.op == "lm_head" for value in node.outputs}
    return [slot for i, slot in enumerate(planned.slots) if i not in logits]


def plan_bytes(graph: Graph, formats: Mapping[str, str], tokens: int, logit_rows: int) -> int:
    """Bytes of a plan's buffers, and of the largest scratch memory of a kernel, which they share. Of logits, only the rows of
    captured steps are the plan's own."""
    slots = sum(_VALUE_BYTES * slot.width * (logit_rows if slot.selected else tokens) for slot in value_slots(graph))
    captured = _VALUE_BYTES * graph.logits_width * rows_bucket(min(logit_rows, MOST_ROWS))
    return slots + captured + _scratch_bytes(graph, formats, tokens)


def _scratch_bytes(graph: Graph, formats: Mapping[str, str], tokens: int) -> int:
    """Of one kernel; an upper bound for matrices whose format is not among `formats`."""
    sizes, shapes = [0], weight_shapes(graph)
    for node in graph.nodes:
        if node.op == "attention":
            a = node.attrs
            sizes.append(attention_scratch_bytes(a["heads"], a["kv_heads"], a["head_dim"]))
        if node.op in ("linear", "gate_up", "lm_head"):
            products = 2 if node.op == "gate_up" else 1
            apart = products == 2 and len({formats.get(name) for name in node.weights}) == 2  # `up` has its own buffer
            for name in node.weights:
                rows, cols = shapes[name]
                tile_rows, groups = tile_counts(rows, cols)
                words = LAYOUTS[formats.get(name, "fp32")].words
                taken = product_scratch_bytes(tokens, rows, cols, tile_rows, groups * words, products)
                sizes.append(taken + (_VALUE_BYTES * tokens * rows if apart else 0))
    return max(sizes)


class CudaSizes:
    """Implements `Sizes`."""

    def block_bytes(self, graph: Graph, kv_dtype: str) -> int:
        check_cache(graph)
        assert isinstance(graph.cache, CacheSpec)
        return layer_offsets(graph.cache)[1] * KV_DTYPES[kv_dtype].itemsize

    def state_bytes(self, graph: Graph) -> int:
        """Zero: graphs with states are refused."""
        return 0

    def buffer_bytes(
        self, graph: Graph, formats: Mapping[str, str], options: CompileOptions, tokens: int, logit_rows: int
    ) -> int:
        heads = [value for node in graph.nodes if node.op == "lm_head" for value in node.outputs]
        rows = {True: logit_rows, False: tokens}
        logits = sum(_VALUE_BYTES * value.width * rows[value.selected] for value in heads)
        return plan_bytes(graph, formats, tokens, logit_rows) + logits
