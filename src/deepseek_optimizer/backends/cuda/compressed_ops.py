"""The ops of DeepSeek-V4's compressed attention and hyper-connections: launches the kernels of a node on its values, as
`ops.py` does.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...graph.ir import Node
from .kernels import compress, compressed_attention, heads, indexer, latent, linear, streams
from .ops import Op, Run, Values, frequencies_name


def _rows_write(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    store, kind = run.cache, node.attrs["layer"]
    latent.store(inputs[0], store.data, run.at.slots[store.group_of(kind)], store.offsets[kind])


def _compress(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    a, at, store = node.attrs, run.at, run.cache
    bias, norm = (run.weights.vectors[name] for name in node.weights)
    compress.compress(
        store.data, bias, norm, run.weights.vectors[frequencies_name(a["rope"])], at.ends, at.sequence,
        at.tables[store.group_of(a["source"])], at.tables[store.group_of(a["layer"])], store.offsets[a["source"]],
        store.offsets[a["layer"]], overlap=a["overlap"], eps=a["eps"], scaling=a["rope"].scaling, first_rotated=a["offset"],
    )  # fmt: skip


def _entries_choose(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    (q, weights), a, at, store = inputs, node.attrs, run.at, run.cache
    tables, offset = at.tables[store.group_of(a["layer"])], store.offsets[a["layer"]]
    indexer.choose(q, weights, store.data, offset, tables, at.sequence, at.ends, outputs[0], a["scale"], a["every"])


def _compressed_attention(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    a, at, store = node.attrs, run.at, run.cache
    q, out = (value.unflatten(-1, (a["heads"], -1)) for value in (inputs[0], outputs[0]))
    entries = None
    if a["entries"] >= 0:
        entries = store.offsets[a["entries"]], at.tables[store.group_of(a["entries"])], a["every"]
    for tiles in at.phases:
        compressed_attention.attention(
            q, store.data, store.offsets[a["layer"]], at.tables[store.group_of(a["layer"])], entries, tiles,
            run.weights.vectors[node.weights[0]], out, scale=a["scale"], window=a["window"],
            chosen=inputs[1] if len(inputs) > 1 else None,
        )  # fmt: skip


def _grouped_linear(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    groups, (name,) = node.attrs["groups"], node.weights
    if node.attrs.get("shared", False):
        x, out = (value.view(len(value) * groups, -1) for value in (inputs[0], outputs[0]))
        linear.linear(x, run.weights.matrices[name], None, out)
    else:
        x, out = (value.unflatten(-1, (groups, -1)) for value in (inputs[0], outputs[0]))
        stack = run.weights.stacks[name]
        heads.HeadInputs(x, stack).products(stack, 0, out)


def _stream_weights(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    a, (bias, scale) = node.attrs, (run.weights.vectors[name] for name in node.weights)
    streams.weights(inputs[0], bias, scale, outputs[0], a["streams"], a["steps"], a["eps"])


def _stream_collapse(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    rows, weights = inputs
    streams.collapse(rows, weights, outputs[0])


def _stream_expand(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    rows, weights, y = inputs
    streams.expand(rows, weights, y, outputs[0])


def _draft_out(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    if run.wants_hidden:
        run.drafts = inputs[0].clone()


COMPRESSED_OPS: Mapping[str, Op] = {
    "compress": _compress,
    "compressed_attention": _compressed_attention,
    "draft_out": _draft_out,
    "entries_choose": _entries_choose,
    "grouped_linear": _grouped_linear,
    "rows_write": _rows_write,
    "stream_collapse": _stream_collapse,
    "stream_expand": _stream_expand,
    "stream_weights": _stream_weights,
}
