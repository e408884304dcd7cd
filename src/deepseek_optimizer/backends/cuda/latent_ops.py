"""The ops of latent attention: launches the kernels of a node on its values, as `ops.py` does."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ...graph.ir import Node
from ..base import DECODE
from ..kv_b import key_stack, value_stack
from .buckets import MOST_ROWS
from .division import expands
from .kernels import expanded_attention, indexer, latent, latent_attention
from .latent_store import CudaLatentStore
from .ops import Op, Run, Values


def _latent(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    (x, table), a = inputs, node.attrs
    latent.latent(x, run.weights.vectors[node.weights[0]], table, a["eps"], a["interleaved"], outputs[0])


def _latent_write(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    store, layer = _latents(run), node.attrs["layer"]
    latent.store_latents(inputs[0], store.data, run.at.slots[0], store.offsets[layer], store.spec.rank)


def _index_write(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    store = _latents(run)
    latent.store(inputs[0], store.floats, run.at.slots[0], store.index_offset(node.attrs["layer"]))


def _index_choose(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    (q, weights), a, at, store = inputs, node.attrs, run.at, _latents(run)
    offset = store.index_offset(a["layer"])
    indexer.choose(q, weights, store.floats, offset, at.tables[0], at.sequence, at.ends, outputs[0], a["scale"])


def _mla_attention(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    """Decoding is absorbed. Prompts are expanded where that is cheaper in all (`division.expands`)."""
    a, (kv_b,), at, chosen = node.attrs, node.weights, run.at, inputs[1] if len(inputs) > 1 else None
    q, out = (value.unflatten(-1, (a["heads"], -1)) for value in (inputs[0], outputs[0]))
    stacks = run.weights.stacks[key_stack(kv_b)], run.weights.stacks[value_stack(kv_b)]
    cache, offset, phases, absorbed = run.cache.data, run.cache.offsets[a["layer"]], at.phases, len(q)
    for sequence, first, rows, context in _expanded(run, node, cache):
        absorbed, phases = min(first, absorbed), tuple(tiles for tiles in at.phases if tiles.blocks)
        part = slice(first, first + rows)
        expanded_attention.expanded_attention(
            q[part], *stacks, cache, offset, at.tables[0][sequence], context, out[part], scale=a["scale"]
        )
    if absorbed:
        latent_attention.latent_attention(
            q[:absorbed], *stacks, cache, offset, at.tables[0], phases, at.ends, out[:absorbed], scale=a["scale"],
            window=a.get("window", 0), sinks=a.get("sinks", 0), chosen=chosen,
        )  # fmt: skip


def _expanded(run: Run, node: Node, cache: torch.Tensor) -> list[tuple[int, int, int, int]]:
    """The prompts of a step if they are expanded: sequence, first row, rows, and tokens before them. All of them are, or none,
    so that the rows in the absorbed form are the first ones."""
    a, batch = node.attrs, run.batch
    if batch is None or len(batch.positions) <= MOST_ROWS or len(node.inputs) > 1 or a.get("window", 0):
        return []
    if cache.dtype not in (torch.float32, torch.bfloat16):
        return []
    starts = np.cumsum(batch.query_len) - batch.query_len
    prompts = [
        (int(s), int(starts[s]), int(batch.query_len[s]), int(batch.context_len[s]))
        for s in np.flatnonzero(batch.phase != DECODE)
    ]
    sizes = a["nope"], a["rope"], a["v_dim"], a["rank"]
    return prompts if all(expands(rows, context, *sizes) for _, _, rows, context in prompts) else []


def _latents(run: Run) -> CudaLatentStore:
    assert isinstance(run.cache, CudaLatentStore)  # the plan has checked it
    return run.cache


LATENT_OPS: Mapping[str, Op] = {
    "index_choose": _index_choose,
    "index_write": _index_write,
    "latent": _latent,
    "latent_write": _latent_write,
    "mla_attention": _mla_attention,
}
