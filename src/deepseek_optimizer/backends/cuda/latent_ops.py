"""The ops of latent attention: launches the kernels of a node on its values, as `ops.py` does."""

from __future__ import annotations

from collections.abc import Mapping

from ...graph.ir import Node
from .kernels import latent, latent_attention
from .kv_b import key_stack, value_stack
from .ops import Op, Run, Values


def _latent(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    (x, table), a = inputs, node.attrs
    latent.latent(x, run.weights.vectors[node.weights[0]], table, a["eps"], a["interleaved"], outputs[0])


def _latent_write(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    store = run.cache
    latent.store(inputs[0], store.data, run.at.slots[0], store.offsets[node.attrs["layer"]])


def _mla_attention(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    """Absorbed in both phases: expanding would be cheaper for long prompts, but needs the keys and values of all heads."""
    a, (kv_b,), store = node.attrs, node.weights, run.cache
    latent_attention.latent_attention(
        inputs[0].unflatten(-1, (a["heads"], -1)), run.weights.stacks[key_stack(kv_b)], run.weights.stacks[value_stack(kv_b)],
        store.data, store.offsets[a["layer"]], run.at.tables[0], run.at.phases, run.at.ends,
        outputs[0].unflatten(-1, (a["heads"], -1)), scale=a["scale"], window=a.get("window", 0), sinks=a.get("sinks", 0),
    )  # fmt: skip


LATENT_OPS: Mapping[str, Op] = {"latent": _latent, "latent_write": _latent_write, "mla_attention": _mla_attention}
