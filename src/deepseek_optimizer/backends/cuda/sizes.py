"""Memory that plans and caches take, computed from the graph alone."""

from __future__ import annotations

from collections.abc import Mapping

from ...graph.analysis import stack_shapes, weight_shapes
from ...graph.ir import Graph
from ...graph.ops.products import rows_of
from ...graph.planner import Slot, assign_slots
from ...quant.base import TILE_ROWS
from ...quant.tiles import tile_counts
from ..base import BLOCK_TOKENS, CompileOptions
from ..reference.states import state_bytes
from .alternative import Chosen, ProductShape
from .buckets import MOST_ROWS, rows_bucket
from .division import (
    DEFAULT,
    HEAD_ROWS,
    Division,
    adapter_splits,
    attention_scratch_bytes,
    expanded_scratch_bytes,
    expert_scratch_bytes,
    index_scratch_bytes,
    latent_scratch_bytes,
    product_scratch_bytes,
)
from .host_graph import divide
from .layouts import LAYOUTS
from .store import KV_DTYPES
from .stores import block_elements
from .supported import check_cache

PRODUCTS = ("linear", "gate_up", "lm_head")  # ops that multiply rows with matrices
_VALUE_BYTES = 4  # values are float32; products round their rows themselves


def value_slots(graph: Graph) -> list[Slot]:
    """The buffers of a plan, without the logits."""
    planned = assign_slots(graph)
    logits = {planned.slot_of[value] for node in graph.nodes if node.op == "lm_head" for value in node.outputs}
    return [slot for i, slot in enumerate(planned.slots) if i not in logits]


def reserved_rows(tokens: int, logit_rows: int, captured: bool) -> tuple[int, int]:
    """The rows, and rows of logits, that the buffers of a plan have for steps of up to this size: captured steps are padded to
    those of their bucket."""
    if not captured:
        return tokens, logit_rows
    return max(tokens, rows_bucket(min(tokens, MOST_ROWS))), max(logit_rows, rows_bucket(min(logit_rows, MOST_ROWS)))


def plan_bytes(
    graph: Graph,
    formats: Mapping[str, str],
    tokens: int,
    logit_rows: int,
    captured: bool,
    division: Division = DEFAULT,
    coded: bool = False,
    alternatives: tuple[Chosen, ...] = (),
) -> int:
    """Bytes of a plan's buffers, and of the largest scratch memory of a kernel or an alternative, which they share.

    With captured steps, also what is theirs: their logits, and as their memory is apart from that of other steps, the same
    scratch memory for as many rows as they have, and the last hidden states.

    Args:
        coded: whether products round rows to FP8.
    """
    tokens, logit_rows = reserved_rows(tokens, logit_rows, captured)
    rows = {True: logit_rows, False: tokens}
    slots = sum(_VALUE_BYTES * slot.width * slot.repeat * rows[slot.selected] for slot in value_slots(graph))
    held = 0
    if captured:
        padded = rows_bucket(min(tokens, MOST_ROWS))
        returned = {node.op: node.inputs[0].width for node in graph.nodes if node.op in ("hidden_out", "draft_out")}
        hidden = sum(returned.values())  # the last hidden states, and draft states where these are others
        logits = graph.logits_width * rows_bucket(min(logit_rows, MOST_ROWS))
        other = _alternative_bytes(graph, formats, padded, coded, alternatives)
        held = _VALUE_BYTES * (logits + hidden * padded) + max(_scratch_bytes(graph, formats, padded, division), other)
    scratch = _scratch_bytes(graph, formats, tokens, division)
    return slots + held + max(scratch, _alternative_bytes(graph, formats, tokens, coded, alternatives))


def _alternative_bytes(
    graph: Graph, formats: Mapping[str, str], tokens: int, coded: bool, alternatives: tuple[Chosen, ...]
) -> int:
    """Scratch memory of one product that an alternative may compute."""
    sizes, shapes = [0], weight_shapes(graph)
    for chosen in alternatives:
        for node in graph.nodes:
            if node.op not in PRODUCTS or tokens < chosen.rows:
                continue
            for name, part in zip(node.weights, rows_of(node), strict=True):
                begin, end = (0, shapes[name][0]) if part is None else (part[0] // TILE_ROWS * TILE_ROWS, part[1])
                of_format, columns = formats.get(name, "fp32"), shapes[name][1]
                if chosen.takes(tokens, ProductShape(of_format, coded and of_format == "fp8", begin, end - begin, columns)):
                    count = 2 if node.op == "gate_up" else 1
                    sizes.append(chosen.alternative.scratch_bytes(tokens, end - begin, columns, count))
    return max(sizes)


def _scratch_bytes(graph: Graph, formats: Mapping[str, str], tokens: int, division: Division) -> int:
    """Of one kernel; an upper bound for matrices whose format is not among `formats`."""
    sizes, shapes = [0], weight_shapes(graph)
    for node in graph.nodes:
        if node.op == "attention":
            a = node.attrs
            sizes.append(attention_scratch_bytes(a["heads"], a["kv_heads"], a["head_dim"], division))
        if node.op == "mla_attention":
            a = node.attrs
            sizes.append(latent_scratch_bytes(tokens, a["heads"], a["rank"], a["nope"], division))
            if tokens > MOST_ROWS:
                width = a["nope"] + a["v_dim"]
                sizes.append(expanded_scratch_bytes(tokens, graph.max_positions, a["heads"], width, a["rank"]))
        if node.op == "index_choose":
            sizes.append(index_scratch_bytes(tokens, graph.max_positions))
        if node.op in ("experts_gate_up", "experts_down"):
            rows, cols = stack_shapes(graph)[node.weights[0]][1:]
            a, gated = node.attrs, node.op == "experts_gate_up"
            sizes.append(expert_scratch_bytes(tokens, a["top_k"], a["experts"], rows, cols, gated))
        if node.op in ("router", "hash_router"):  # scores beside the product's own
            sizes.append(_VALUE_BYTES * tokens * (node.attrs["experts"] + 32 + node.inputs[0].width))
        if node.op == "compressed_attention":
            a = node.attrs
            sizes.append(_VALUE_BYTES * division.programs * min(HEAD_ROWS, a["heads"]) * (a["head_dim"] + 2))
        if node.op == "entries_choose":
            sizes.append(index_scratch_bytes(tokens, -(-graph.max_positions // node.attrs["every"])))
        if node.op == "grouped_linear":  # rows in the order of words
            sizes.append(_VALUE_BYTES * tokens * (node.inputs[0].width + 31 * node.attrs["groups"]))
        if node.op == "block_choose":
            a, most = node.attrs, -(-graph.max_positions // BLOCK_TOKENS)
            sizes.append(index_scratch_bytes(tokens, (a["heads"] + a["kv_heads"]) * most))
        if node.op == "lora_down":
            sizes.append(_VALUE_BYTES * tokens * node.outputs[0].width * adapter_splits(node.inputs[0].width))
        if node.op in PRODUCTS:
            products = 2 if node.op == "gate_up" else 1
            parts = [part for part in rows_of(node) if part is not None and part[0] % TILE_ROWS]  # first results are left out
            apart = products == 2 and (bool(parts) or len({formats.get(name) for name in node.weights}) == 2)  # `up`
            for name in node.weights:
                rows, cols = shapes[name]
                tile_rows, groups = tile_counts(rows, cols)
                words = LAYOUTS[formats.get(name, "fp32")].words
                taken = product_scratch_bytes(tokens, rows, cols, tile_rows, groups * words, products, division)
                more = (rows if apart else 0) + max((end - begin + TILE_ROWS for begin, end, _ in parts), default=0)
                sizes.append(taken + _VALUE_BYTES * tokens * more)
    return max(sizes)


class CudaSizes:
    """Implements `Sizes`, for plans that capture small steps, with the default division and without alternatives, unless the
    attributes are set."""

    captures = True
    division = DEFAULT
    alternatives: tuple[Chosen, ...] = ()

    def block_bytes(self, graph: Graph, kv_dtype: str) -> int:
        check_cache(graph, kv_dtype)
        return block_elements(graph.cache, kv_dtype) * KV_DTYPES[kv_dtype].itemsize

    def state_bytes(self, graph: Graph) -> int:
        return state_bytes(graph.states)

    def buffer_bytes(
        self, graph: Graph, formats: Mapping[str, str], options: CompileOptions, tokens: int, logit_rows: int
    ) -> int:
        graph, _ = divide(graph, options.host_experts)
        heads = [value for node in graph.nodes if node.op == "lm_head" for value in node.outputs]
        rows = {True: logit_rows, False: tokens}
        logits = sum(_VALUE_BYTES * value.width * rows[value.selected] for value in heads)
        coded = options.activation == "fp8"
        own = plan_bytes(graph, formats, tokens, logit_rows, self.captures, self.division, coded, self.alternatives)
        return own + logits
