"""Compressed attention. Source: DeepSeek-V4 (2026), section 2.3; `graph/ops/compressed.py` has the formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F

from ...graph.ir import Node
from . import latent, ops, streams
from .step import Step


class Plan(Protocol):
    """What these ops use of a `ReferencePlan`."""

    device: torch.device
    dtype: torch.dtype

    def weight(self, name: str) -> torch.Tensor: ...

    def rounded(self, x: torch.Tensor, name: str, finest: bool = False) -> torch.Tensor: ...

    def sequences_of(self, step: Step, layer: int) -> list[tuple[slice, int, torch.Tensor]]: ...


def entries(rows: torch.Tensor, before: torch.Tensor | None, bias: torch.Tensor) -> torch.Tensor:
    """Entries of consecutive windows of tokens, before their norm, float32 [n, width].

    Args:
        rows: float32 [n, every, 2 * width]: c and z of each window's tokens; with overlap [n, every, 4 * width]: c', c, z', z.
        before: with overlap, float32 as `rows`: of each window the tokens before it; NaN where there are none.
        bias: float32 [every, width], with overlap [every, 2 * width].
    """
    c, z = rows.chunk(2, -1)
    z = z + bias
    if before is not None:
        none = before.isnan().any(-1, keepdim=True)
        earlier_c, earlier_z = before.chunk(2, -1)
        first = slice(0, c.shape[-1] // 2)
        earlier_z = (earlier_z + bias)[..., first].masked_fill(none, -torch.inf)
        second = slice(first.stop, None)
        c = torch.cat((earlier_c[..., first].masked_fill(none, 0.0), c[..., second]), 1)
        z = torch.cat((earlier_z, z[..., second]), 1)
    return (c * z.softmax(1)).sum(1)


def _rows_write(plan: Plan, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    for rows, context, table in plan.sequences_of(step, node.attrs["layer"]):
        step.store.write(node.attrs["layer"], table, _span(context, context + rows.stop - rows.start, x), x[rows])
    return ()


def _compress(plan: Plan, step: Step, node: Node) -> tuple[torch.Tensor, ...]:
    """In float32, whatever the dtype of the rows."""
    a, every = node.attrs, node.attrs["every"]
    bias, norm = (plan.weight(name).float() for name in node.weights)
    inv_freq = torch.from_numpy(a["rope"].inv_freq).to(plan.device)
    pairs = zip(plan.sequences_of(step, a["layer"]), plan.sequences_of(step, a["source"]), strict=True)
    for (rows, context, table), (_, _, source) in pairs:
        numbers = _span(context // every, (context + rows.stop - rows.start) // every, bias)
        if not len(numbers):
            continue

        def window(of: torch.Tensor, blocks: torch.Tensor = source) -> torch.Tensor:
            tokens = of[:, None] * every + torch.arange(every, device=of.device, dtype=torch.int64)
            return step.store.gather(a["source"], blocks, tokens.clamp(min=0).flatten()).unflatten(0, (-1, every))

        before = None
        if a["overlap"]:
            before = window(numbers - 1)
            before[numbers == 0] = torch.nan
        made = ops.rms_norm(entries(window(numbers), before, bias), norm, a["eps"])
        angles = ops.rope_table(numbers * every, inv_freq, a["rope"].scaling)
        step.store.write(a["layer"], table, numbers, ops.rope(made, angles, 1, True, a["offset"]))
    return ()


def _entries_choose(plan: Plan, step: Step, node: Node, q: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In float32, whatever the dtype of the rows, as are the resulting numbers of entries."""
    a, chosen = node.attrs, []
    q, weights = q.float().unflatten(-1, (a["heads"], -1)), weights.float()
    for rows, context, table in plan.sequences_of(step, a["layer"]):
        seen, numbers = _entries_seen(rows, context, a["every"], q)
        if not len(numbers):
            chosen.append(q.new_full((rows.stop - rows.start, a["top_k"]), -1.0))
            continue
        scores = latent.index_scores(q[rows], weights[rows], step.store.gather(a["layer"], table, numbers), a["scale"])
        chosen.append(latent.choose(scores, numbers < seen[:, None], a["top_k"]))
    return (torch.cat(chosen),)


def _attention(
    plan: Plan, step: Step, node: Node, q: torch.Tensor, chosen: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """In float32, whatever the dtype of the rows; the result is rounded to that."""
    a, window = node.attrs, node.attrs["window"]
    q = q.float().unflatten(-1, (1, a["heads"], a["head_dim"]))
    sink, out = plan.weight(node.weights[0]).float()[None], torch.empty_like(q)
    for s, (rows, context, table) in enumerate(plan.sequences_of(step, a["layer"])):
        tokens = _span(max(0, context + 1 - window), context + rows.stop - rows.start, q)
        keys = step.store.gather(a["layer"], table, tokens)
        mask = ops.visible(rows.stop - rows.start, context, tokens, window)
        if a["entries"] >= 0:
            seen, numbers = _entries_seen(rows, context, a["every"], q)
            of_entries = plan.sequences_of(step, a["entries"])[s][2]
            keys = torch.cat((keys, step.store.gather(a["entries"], of_entries, numbers)))
            visible = numbers < seen[:, None]
            if chosen is not None:
                visible &= latent.chosen_keys(chosen[rows], len(numbers))
            mask = torch.cat((mask, visible), -1)
        out[rows] = ops.attention(q[rows], keys[:, None], keys[:, None], mask, a["scale"], 0.0, sink)
    return (out.flatten(1).to(plan.dtype),)


def _grouped_linear(plan: Plan, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    (name,), groups = node.weights, node.attrs["groups"]
    x, weight = plan.rounded(x.unflatten(-1, (groups, -1)), name, finest=True), plan.weight(name)
    if node.attrs.get("shared", False):
        return (F.linear(x, weight).flatten(1),)
    return (torch.einsum("tgk,gnk->tgn", x, weight.unflatten(0, (groups, -1))).flatten(1),)


def _stream_weights(plan: Plan, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    a = node.attrs
    bias, scale = (plan.weight(name) for name in node.weights)
    return (streams.weights(x, bias, scale, a["streams"], a["steps"], a["eps"]),)


def _stream_collapse(plan: Plan, step: Step, node: Node, x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (streams.collapse(x, weights, node.attrs["streams"]),)


def _stream_expand(
    plan: Plan, step: Step, node: Node, x: torch.Tensor, weights: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return (streams.expand(x, weights, y, node.attrs["streams"]),)


def _span(begin: int, end: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(begin, end, device=like.device, dtype=torch.int64)


def _entries_seen(rows: slice, context: int, every: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of entries that each row of a sequence sees, and the numbers of those that any row sees."""
    end = context + rows.stop - rows.start
    return (_span(context, end, like) + 1) // every, _span(0, end // every, like)


OPS: Mapping[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "rows_write": _rows_write,
    "compress": _compress,
    "entries_choose": _entries_choose,
    "compressed_attention": _attention,
    "grouped_linear": _grouped_linear,
    "stream_weights": _stream_weights,
    "stream_collapse": _stream_collapse,
    "stream_expand": _stream_expand,
}
