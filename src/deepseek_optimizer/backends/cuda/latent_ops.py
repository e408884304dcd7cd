"""The ops of latent attention: launches the kernels of a node on its values, as `ops.py` does."""

from __future__ import annotations

from collections.abc import Mapping

from ...graph.ir import Node
from ..kv_b import key_stack, value_stack
from .kernels import indexer, latent, latent_attention
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
    """Absorbed in both phases: expanding would be cheaper for long prompts, but needs the keys and values of all heads."""
    a, (kv_b,), store, chosen = node.attrs, node.weights, run.cache, inputs[1] if len(inputs) > 1 else None
    latent_attention.latent_attention(
        inputs[0].unflatten(-1, (a["heads"], -1)), run.weights.stacks[key_stack(kv_b)], run.weights.stacks[value_stack(kv_b)],
        store.data, store.offsets[a["layer"]], run.at.tables[0], run.at.phases, run.at.ends,
        outputs[0].unflatten(-1, (a["heads"], -1)), scale=a["scale"], window=a.get("window", 0), sinks=a.get("sinks", 0),
        chosen=chosen,
    )  # fmt: skip


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
