"""Checks of a step before anything is written, the same as in the native library."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import BackendError
from ...graph.attention_mode import Span
from ...graph.ir import CacheSpec, Graph
from ...graph.ops.grids import IN_GRIDS
from ..base import BLOCK_TOKENS, DECODE, PREFILL, StepBatch


@dataclass(frozen=True)
class StepNeeds:
    """What steps of a graph must have: facts about its nodes, which are looked at once and not in every step.

    Attributes:
        graph: the graph.
        states: width of `StepBatch.states`; None: there are none.
        looks_up, has_head: as of the graph.
        features: of `StepBatch.features`, with elements of `hidden_size`.
        whole: whether attention is to all tokens of a sequence.
        axes: whether `StepBatch.axes` is needed.
        grids: (rows, columns) that positions on axes must lie in.
        plain: whether attention is to all keys that a row may see.
    """

    graph: Graph
    states: int | None
    looks_up: bool
    has_head: bool
    features: int
    whole: bool
    axes: bool
    grids: tuple[tuple[int, int], ...]
    plain: bool

    @classmethod
    def of(cls, graph: Graph) -> StepNeeds:
        nodes = graph.nodes
        return cls(
            graph,
            graph.draft_width if any(n.op == "state_in" for n in nodes) else None,
            graph.looks_up,
            graph.has_head,
            graph.features,
            any(n.op == "encoder_attention" for n in nodes),
            any(n.op in IN_GRIDS for n in nodes),
            tuple((n.attrs["grid_rows"], n.attrs["grid_cols"]) for n in nodes if "grid_rows" in n.attrs),
            isinstance(graph.cache, CacheSpec) and not any(n.op == "attention" and len(n.inputs) > 1 for n in nodes),
        )


def check_batch(
    batch: StepBatch, graph: Graph, num_blocks: int, spans: tuple[Span, ...] = (None,), num_states: int = 0
) -> None:
    """`check_step` of a graph."""
    check_step(batch, StepNeeds.of(graph), num_blocks, spans, num_states)


def check_step(
    batch: StepBatch, needs: StepNeeds, num_blocks: int, spans: tuple[Span, ...] = (None,), num_states: int = 0
) -> None:
    """Raises BackendError, naming the field, if a batch is inconsistent with itself, the graph or the cache.

    Args:
        batch: the step.
        needs: of the plan's graph.
        num_blocks: size of the cache.
        spans: window and sinks of each group of layers (`graph.cache_groups.group_spans`): blocks that no row sees may be
            missing.
        num_states: number of slots for recurrent states.
    """
    tokens, sequences, graph = len(batch.positions), len(batch.query_len), needs.graph
    _require(tokens > 0 and sequences > 0, "query_len", "a step needs at least one token")
    for name in ("context_len", "phase"):
        _require(len(getattr(batch, name)) == sequences, name, f"must have one entry for each of {sequences} sequences")
    _require(int(batch.query_len.min()) > 0, "query_len", "each sequence needs at least one token")
    _require(int(batch.query_len.sum()) == tokens, "query_len", f"must sum to {tokens} tokens")
    _require(_within(batch.positions), "positions", "must not be negative")
    _require(_within(batch.context_len), "context_len", "must not be negative")
    if batch.reach is not None:
        _require(len(batch.reach) == sequences and (batch.reach > 0).all(), "reach", f"must be {sequences} positive values")
    phases = batch.phase.tolist()
    _require(set(phases) <= {DECODE, PREFILL} and phases == sorted(phases), "phase", "must be decode first, then prefill")
    _check_inputs(batch, needs, tokens)
    if graph.cache.elements_per_token:
        _check_blocks(batch, num_blocks, spans)
    if needs.whole:
        _require(not batch.context_len.any(), "context_len", "must be 0: this graph has bidirectional attention")
    _check_states(batch, graph, num_states)
    _check_adapters(batch, graph)
    _check_pictures(batch, needs, tokens)
    rows = batch.logit_rows.tolist()
    inside = not rows or (rows[0] >= 0 and rows[-1] < tokens)
    ascending = all(map(operator.lt, rows, rows[1:]))
    _require(inside and ascending, "logit_rows", f"must ascend within [0, {tokens})")
    _require(not rows or needs.has_head, "logit_rows", "must be empty: this graph has no head")


def _check_inputs(batch: StepBatch, needs: StepNeeds, tokens: int) -> None:
    wanted, graph = None if needs.states is None else (tokens, needs.states), needs.graph
    given = None if batch.states is None else tuple(batch.states.shape)
    _require(given == wanted, "states", f"must have shape {wanted}" if wanted else "must be None: this graph has no state_in")
    if batch.inputs_embeds is not None:
        wanted = (tokens, graph.hidden_size)
        _require(tuple(batch.inputs_embeds.shape) == wanted, "inputs_embeds", f"must have shape {wanted}")
        if not needs.looks_up:
            return
    ids = batch.token_ids
    _require(len(ids) == tokens, "token_ids", f"must have {tokens} entries")
    _require(_within(ids, graph.vocab_size), "token_ids", f"must lie in [0, {graph.vocab_size})")


def _check_blocks(batch: StepBatch, num_blocks: int, spans: tuple[Span, ...]) -> None:
    ends, most = batch.context_len + batch.query_len, batch.block_table.shape[-1]
    shape = (len(spans), len(ends)) if len(spans) > 1 else (len(ends),)
    _require(batch.block_table.shape[:-1] == shape, "block_table", f"must have shape {[*shape, 'max_blocks']}")
    _require(int(ends.max()) <= most * BLOCK_TOKENS, "block_table", "has too few blocks for a sequence")
    if _within(batch.block_table, num_blocks):  # whether it is used or not
        return
    needed, block = -(-ends // BLOCK_TOKENS), np.arange(most)
    for tables, span in zip(batch.tables(len(spans)), spans, strict=True):
        used = block < needed[:, None]
        if span is not None:
            window, sinks = span
            seen_from = np.maximum(0, batch.context_len + 1 - window) // BLOCK_TOKENS
            used &= (block < -(-sinks // BLOCK_TOKENS)) | (block >= seen_from[:, None])
        valid = (tables >= 0) & (tables < num_blocks)
        _require((valid | ~used).all(), "block_table", f"has block ids outside [0, {num_blocks})")


def _check_states(batch: StepBatch, graph: Graph, slots: int) -> None:
    if not graph.states:
        return
    for name in ("state_from", "state_to"):
        _require(getattr(batch, name) is not None, name, "is missing")
    assert batch.state_from is not None and batch.state_to is not None
    source, (rows, targets) = batch.state_from, batch.state_to.reshape(-1, 2).T
    _require(source.shape == batch.query_len.shape, "state_from", f"must have {len(batch.query_len)} entries")
    _require(((source >= -1) & (source < slots)).all(), "state_from", f"must lie in [-1, {slots})")
    _require(((source >= 0) == (batch.context_len > 0)).all(), "state_from", "must be -1 for new sequences, and only for them")
    ends = np.cumsum(batch.query_len)
    inside = not len(rows) or (rows[0] >= 0 and rows[-1] < ends[-1])
    _require(inside and (np.diff(rows) > 0).all(), "state_to", f"must have ascending rows within [0, {ends[-1]})")
    _require(np.isin(ends - 1, rows).all(), "state_to", "must have the last row of every sequence")
    _require(((targets >= 0) & (targets < slots)).all(), "state_to", f"has slots outside [0, {slots})")
    _require(len(np.unique(targets)) == len(targets), "state_to", "has a slot twice")
    sequence = np.searchsorted(ends, rows, side="right")
    replaced = np.isin(targets, source)
    own = (source[sequence] == targets) & (rows == ends[sequence] - 1)
    alone = np.array([(source == slot).sum() == 1 for slot in targets])
    _require((~replaced | (own & alone)).all(), "state_to", "overwrites a slot that is read, other than after its last row")


def _check_adapters(batch: StepBatch, graph: Graph) -> None:
    if batch.adapter_of is None or not graph.adapter_sites:
        return
    _require(batch.adapters is not None, "adapters", "is missing")
    assert batch.adapters is not None
    slots = batch.adapters.slots
    _require(batch.adapter_of.shape == batch.query_len.shape, "adapter_of", f"must have {len(batch.query_len)} entries")
    _require(((batch.adapter_of >= -1) & (batch.adapter_of < slots)).all(), "adapter_of", f"must lie in [-1, {slots})")


def _check_pictures(batch: StepBatch, needs: StepNeeds, tokens: int) -> None:
    if batch.axes is not None:
        _require(batch.axes.shape == (tokens, 3), "axes", f"must have shape {(tokens, 3)}")
    _require(batch.axes is not None or not needs.axes, "axes", "is missing")
    for size in needs.grids if batch.axes is not None else ():
        assert batch.axes is not None
        inside = (batch.axes[:, 1:] >= 0) & (batch.axes[:, 1:] < np.array(size))
        _require(inside.all(), "axes", f"must lie in a grid of {size[0]} x {size[1]}")
    if batch.features is not None:
        wanted = (needs.features, tokens, needs.graph.hidden_size)
        _require(tuple(batch.features.shape) == wanted, "features", f"must have shape {wanted}")
    if (ends := batch.visible_to) is None:
        return
    _require(needs.plain, "visible_to", "must be None: this graph attends to latents or to chosen blocks")
    _require(ends.shape == (tokens,), "visible_to", f"must have {tokens} entries")
    first = 0
    for context, count in zip(batch.context_len, batch.query_len, strict=True):
        own, token = ends[first : first + count], np.arange(context, context + count)
        inside = (own > token) & (own <= context + count)
        _require(
            inside.all() and (np.diff(own) >= 0).all(), "visible_to", "must be after the row, in the step, and not descend"
        )
        first += int(count)


def _within(values: npt.NDArray[np.signedinteger[Any]], limit: int = 1 << 31) -> bool:
    """Whether all values lie in [0, limit). Read as unsigned, a negative value is larger than any limit: one pass decides."""
    return int(values.view(f"u{values.itemsize}").max(initial=0)) < limit


def _require(condition: object, field: str, message: str) -> None:
    if not condition:
        raise BackendError(f"step.{field}: {message}")
