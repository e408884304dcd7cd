"""One function per op of dense decoders: launches the kernels of a node on its values. `expert_ops.py` and `latent_ops.py` have
the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...graph.ir import Graph, Node, Value
from ...graph.ops.products import rows_of
from ...quant.base import TILE_ROWS
from ..base import StepBatch
from ..kv_b import key_stack, value_stack
from .adapters import CudaAdapters
from .gates import NO_GATE, OF_OPS, gate_of, limited
from .kernels import attention as attention_kernels
from .kernels import blocks, elementwise, linear, norm, rope, rows
from .kernels.expert_groups import PairTiles
from .matrices import DeviceMatrix, DeviceStack, DeviceTiles
from .step import DeviceStep
from .store import CudaStore, DeviceBlocks


@dataclass(frozen=True)
class Product:
    """A matrix and a bias that are multiplied with rows.

    Attributes:
        skipped: their first rows, whose results are left out: the rows that a node uses may begin within a tile.
    """

    matrix: DeviceMatrix
    bias: torch.Tensor | None
    skipped: int

    def write(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the results of rows x to `out`."""
        if not self.skipped:
            linear.linear(x, self.matrix, self.bias, out)
            return
        all_rows = out.new_empty(len(x), self.matrix.rows)
        linear.linear(x, self.matrix, self.bias, all_rows)
        rows.columns(all_rows, out, 1, self.skipped, self.matrix.rows)


@dataclass(frozen=True)
class Weights:
    """A plan's weights on its device.

    Attributes:
        matrices: by name.
        stacks: by name; of latent attention's kv_b those of `kv_b.key_stack` and `value_stack`.
        vectors: float32, by name; also the frequencies of RoPE tables whose frequencies are the same for all sequences,
            [1, rot/2], by `frequencies_name`, and the tables of op `hash_router`, int32.
        axes: int32 [rot/2], the axis of each frequency, of RoPE with axes by the same name.
    """

    matrices: dict[str, DeviceMatrix]
    stacks: dict[str, DeviceStack]
    vectors: dict[str, torch.Tensor]
    axes: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def narrow(self) -> bool:
        """Whether products round rows to bf16: with any weights but fp32."""
        return any(matrix.layout.narrow for matrix in self.matrices.values())

    def vector(self, name: str | None) -> torch.Tensor | None:
        return None if name is None else self.vectors[name]

    def tiles_of(self, name: str) -> list[DeviceTiles]:
        """What is on the device of a packed weight."""
        if name in self.matrices:
            return [self.matrices[name]]
        return [self.stacks[stack] for stack in (name, key_stack(name), value_stack(name)) if stack in self.stacks]

    def products(self, node: Node) -> list[Product]:
        """Each product of a node."""
        biases = node.attrs["biases"] if "biases" in node.attrs else (node.attrs.get("bias"),)
        made = []
        for name, bias_name, part in zip(node.weights, biases, rows_of(node), strict=True):
            matrix, bias, skipped = self.matrices[name], self.vector(bias_name), 0
            if part is not None:
                skipped = part[0] % TILE_ROWS
                begin, end = part[0] - skipped, part[1]
                matrix, bias = matrix.part(begin, end), None if bias is None else bias[begin:end]
            made.append(Product(matrix, bias, skipped))
        return made


@dataclass
class Run:
    """What ops read of a step, and what they return besides values.

    Attributes:
        at: the step's integers on the device.
        batch: the step on the host; None in steps that may be captured, which depend on `at` alone.
        wants_hidden: whether hidden states are returned.
        hidden: the hidden states so far, by index.
        drafts: the draft states, if the graph returns them apart.
        adapters: those of the step, if its sequences have any.
        pairs: the pairs of tokens and experts by the routes that they are grouped by, from `experts_gate_up` to `experts_down`.
    """

    batch: StepBatch | None
    at: DeviceStep
    store: DeviceBlocks | None
    weights: Weights
    wants_hidden: bool
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    drafts: torch.Tensor | None = None
    adapters: CudaAdapters | None = None
    pairs: dict[Value, PairTiles | None] = field(default_factory=dict)

    @property
    def cache(self) -> DeviceBlocks:
        assert self.store is not None  # graphs that use it have a cache, for which the plan requires a store
        return self.store


Values = list[torch.Tensor]
Op = Callable[[Run, Node, Values, Values], None]


def frequencies_name(spec: Any) -> str:
    """The key of a `RopeSpec`'s frequencies in `Weights.vectors`."""
    return f"rope:{id(spec)}"


def ropes(graph: Graph) -> list[Any]:
    """The `RopeSpec` of each table of a graph, and of the entries that are compressed."""
    return [node.attrs["rope"] for node in graph.nodes if node.op in ("rope_table", "compress")]


def _embedding(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    if run.batch is not None and run.batch.inputs_embeds is not None:
        outputs[0].copy_(run.batch.inputs_embeds.detach())
    else:
        _lookup(run, node, inputs, outputs)


def _lookup(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    rows.embedding(run.at.ids, run.weights.matrices[node.weights[0]], node.attrs["scale"], outputs[0])


def _rms_norm(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    a = node.attrs
    weight = run.weights.vector(node.weights[0] if node.weights else None)
    offset = a.get("unit_offset", False)
    norm.rms_norm(inputs[0], weight, a["eps"], outputs[0], heads=a.get("heads", 1), unit_offset=offset)


def _layer_norm(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    weight, *bias = (run.weights.vectors[name] for name in node.weights)
    norm.layer_norm(inputs[0], weight, bias[0] if bias else None, node.attrs["eps"], outputs[0])


def _add_rms_norm(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    (x, delta), (total, out), a = inputs, outputs, node.attrs
    weight, offset = run.weights.vector(node.weights[0]), a.get("unit_offset", False)
    norm.rms_norm(x, weight, a["eps"], out, unit_offset=offset, delta=delta, total=total)


def _linear(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    for product, out in zip(run.weights.products(node), outputs, strict=True):
        product.write(inputs[0], out)


def _gate_up(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    (x,), (out,), (gate, up) = inputs, outputs, run.weights.products(node)
    if not gate.skipped and not up.skipped:
        linear.gate_up(x, gate.matrix, up.matrix, (gate.bias, up.bias), out, gate_of(node.attrs))
        return
    raised = torch.empty_like(out)
    gate.write(x, out)
    up.write(x, raised)
    elementwise.apply("gate", out, raised, out, gate_of(node.attrs))


def _pairwise(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    a, b = inputs
    gate = limited(node.attrs["limit"]) if node.op == "clamped_swiglu" else OF_OPS.get(node.op, NO_GATE)
    elementwise.apply(node.op if gate is NO_GATE else "gate", a, b, outputs[0], gate)


def _each(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    factor, limit = (*(run.weights.vectors[name] for name in node.weights), None, None)[:2]
    elementwise.each(node.op, inputs[0], outputs[0], node.attrs.get("scale", 1.0), factor=factor, limit=limit)


def _columns(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    rows.columns(inputs[0], outputs[0], **node.attrs)


def _position_scale(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    elementwise.position_scale(inputs[0], run.at.positions, outputs[0], **node.attrs)


def _lm_head(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    _linear(run, node, inputs, outputs)
    scale, cap = node.attrs.get("scale", 1.0), node.attrs.get("softcap", 0.0)
    if scale != 1 or cap != 0:
        elementwise.each("scale", outputs[0], outputs[0], scale, cap)


def _rope_table(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    """The rows of a sequence share its frequencies, which for dynamic RoPE depend on its reach."""
    spec, at = node.attrs["rope"], run.at
    if spec.is_dynamic:
        frequencies, which = at.frequencies[frequencies_name(spec)], at.sequence
    else:
        frequencies, which = run.weights.vectors[frequencies_name(spec)], torch.zeros_like(at.sequence)
    positions, axes = at.positions, None
    if spec.axes:
        assert at.axes is not None  # of graphs with such a table
        positions, axes = at.axes, run.weights.axes[frequencies_name(spec)]
    rope.rope_table(positions, which, frequencies, spec.scaling, outputs[0], axes)


def _rope(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    x, table = inputs
    rope.rope(x, table, node.attrs["heads"], node.attrs["interleaved"], outputs[0], node.attrs.get("offset", 0))


def _cache_write(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    """Ops `cache_write`, with inputs k and v, and `rope_cache`, with q, k, v and the table."""
    a, store = node.attrs, run.cache
    rotated = node.op == "rope_cache"
    k, v = inputs[1:3] if rotated else inputs
    q, table = (inputs[0], inputs[3]) if rotated else (None, None)
    rope.rope_cache(
        q, k, v, table, outputs[0] if outputs else None, store.data, run.at.slots[store.group_of(a["layer"])],
        store.offsets[a["layer"]], heads=a.get("heads", 0), kv_heads=a["kv_heads"], interleaved=a.get("interleaved", False),
    )  # fmt: skip
    if isinstance(store, CudaStore) and store.spec.summaries:
        slots = run.at.slots[store.group_of(a["layer"])]
        blocks.summarize(store.data, slots, store.offsets[a["layer"]], a["kv_heads"], a["head_dim"])


def _block_choose(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    a, store, at = node.attrs, run.cache, run.at
    blocks.choose(
        inputs[0], store.data, store.offsets[a["layer"]], at.tables[store.group_of(a["layer"])], at.sequence, at.ends,
        outputs[0], heads=a["heads"], kv_heads=a["kv_heads"], blocks=a["blocks"], sinks=a["sinks"], window=a["window"],
    )  # fmt: skip


def _attention(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    a, store = node.attrs, run.cache
    learned = run.weights.vectors[node.weights[0]] if node.weights else None
    for tiles in run.at.phases:
        attention_kernels.attention(
            inputs[0], store.data, store.offsets[a["layer"]], run.at.tables[store.group_of(a["layer"])], tiles,
            run.at.ends, outputs[0], heads=a["heads"], kv_heads=a["kv_heads"], scale=a["scale"], window=a.get("window", 0),
            sinks=a.get("sinks", 0), softcap=a.get("softcap", 0.0), learned=learned, chunked=a.get("chunked", False),
            causal=a.get("causal", False), chosen=inputs[1] if len(inputs) > 1 else None,
        )  # fmt: skip


def _encoder_attention(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    a, (q, k, v) = node.attrs, inputs
    for tiles in run.at.phases:
        attention_kernels.step_attention(
            q, k, v, tiles, run.at.ends, outputs[0], heads=a["heads"], kv_heads=a["kv_heads"], scale=a["scale"],
            window=a["window"], narrow=run.weights.narrow,
        )  # fmt: skip


def _select_rows(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    rows.select_rows(run.at.logit_rows, inputs[0], outputs[0])


def _concat(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    a, b = inputs
    rows.concat(a, b, outputs[0])


def _state_in(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    assert run.batch is not None and run.batch.states is not None  # checked by `check_batch`; not captured
    outputs[0].copy_(run.batch.states.detach())


def _add_features(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    features = None if run.batch is None else run.batch.features
    if features is not None:
        own = features[node.attrs["index"]].detach().to(outputs[0].device, torch.float32).contiguous()
        elementwise.apply("add", inputs[0], own, outputs[0])
    elif outputs[0].data_ptr() != inputs[0].data_ptr():
        outputs[0].copy_(inputs[0])


def _hidden_out(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    if run.wants_hidden:
        run.hidden[node.attrs["index"]] = inputs[0].clone()


DENSE_OPS: Mapping[str, Op] = {
    "add": _pairwise,
    "add_features": _add_features,
    "add_rms_norm": _add_rms_norm,
    "attention": _attention,
    "block_choose": _block_choose,
    "cache_write": _cache_write,
    "clamp": _each,
    "clamped_swiglu": _pairwise,
    "columns": _columns,
    "concat": _concat,
    "embedding": _embedding,
    "encoder_attention": _encoder_attention,
    "gate_up": _gate_up,
    "geglu": _pairwise,
    "gelu": _each,
    "gelu_erf": _each,
    "head_norm": _rms_norm,
    "hidden_out": _hidden_out,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "lm_head": _lm_head,
    "lookup": _lookup,
    "multiply": _pairwise,
    "position_scale": _position_scale,
    "relu": _each,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "rope_cache": _cache_write,
    "rope_table": _rope_table,
    "scale": _each,
    "scale_by": _each,
    "select_rows": _select_rows,
    "state_in": _state_in,
    "swiglu": _pairwise,
}
