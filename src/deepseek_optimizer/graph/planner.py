"""Memory planner: values that are never alive together share a slot.

A slot is one buffer of rows. It holds values of one width, kind and row set only, so that a row's stride is its width. Freed
slots are reused last in, first out, since their rows are the most likely to be still in the CPU's caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .ir import Graph, Node, Value
from .ops import spec_of


@dataclass(frozen=True)
class Slot:
    """A buffer of rows: `width` elements per row, stored as `kind`, `repeat` rows per token or selected row."""

    width: int
    kind: str
    selected: bool
    repeat: int = 1


@dataclass(frozen=True)
class SlotPlan:
    """The slots of a graph, and the index of each value's slot."""

    slot_of: Mapping[Value, int]
    slots: tuple[Slot, ...]


def assign_slots(graph: Graph) -> SlotPlan:
    """Assigns a slot to each value. The slot of the logits is not shared, since it is the caller's buffer; nodes after the head
    work in it in place."""
    last_use = last_uses(graph)
    slots: list[Slot] = []
    slot_of: dict[Value, int] = {}
    free: dict[Slot, list[int]] = {}

    def take(value: Value) -> int:
        shape = Slot(value.width, value.kind, value.selected, value.repeat)
        reusable = free.get(shape)
        if reusable and value not in results:
            return reusable.pop()
        slots.append(shape)
        return len(slots) - 1

    head = next((i for i, n in enumerate(graph.nodes) if n.op == "lm_head"), len(graph.nodes))
    results = {value for node in graph.nodes[head:] for value in node.outputs}
    for i, node in enumerate(graph.nodes):
        dying = {v for v in node.inputs if last_use[v] == i}
        for out_index, value in enumerate(node.outputs):
            source = _overwritten(node, out_index, dying)
            if source is None:
                slot_of[value] = take(value)
            else:
                slot_of[value] = slot_of[source]
                dying.discard(source)
        dead_on_arrival = [v for v in node.outputs if v not in last_use and v not in results]
        for value in (*sorted(dying, key=lambda v: v.name), *dead_on_arrival):
            index = slot_of[value]
            free.setdefault(slots[index], []).append(index)
    return SlotPlan(slot_of, tuple(slots))


def last_uses(graph: Graph) -> dict[Value, int]:
    """Value -> index of the last node that reads it, for values that are read."""
    return {value: i for i, node in enumerate(graph.nodes) for value in node.inputs}


def _overwritten(node: Node, out_index: int, dying: set[Value]) -> Value | None:
    """The input that this output may overwrite: one of `dying`, which this node is the last to read."""
    out = node.outputs[out_index]
    for candidate_out, in_index in spec_of(node).in_place:
        source = node.inputs[in_index]
        same = (source.width, source.kind, source.selected, source.repeat) == (out.width, out.kind, out.selected, out.repeat)
        if candidate_out == out_index and source in dying and same:
            return source
    return None
