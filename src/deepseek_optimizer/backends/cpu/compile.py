"""Compiles a graph to a native plan: lowering, slots, weights, steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import BackendError
from ...graph.analysis import dynamic_rope
from ...graph.ir import Graph, LatentSpec, Node, Value
from ...graph.min_formats import exact_weights
from ...graph.ops import OpSpec, spec_of
from ...graph.planner import assign_slots
from ...quant import get_format, pack
from ...quant.packed import PackedMatrix, PackedStack, PackedWeight
from .buffers import address
from .derived_weights import with_derived_weights
from .lower import lower
from .mla_weights import absorbed_stacks, absorbs
from .native import FLAGS, SLOT_KINDS, VECTOR, Context
from .packer import stack_struct, weight_struct
from .plan import CpuPlan
from .structs import Slot, Step, Weight

INTEGER_FORMATS = (
    "int8", "int4", "int3", "q4_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "iq4_nl", "q5_0", "q5_1", "mxfp4",
    "int8_nested", "int4_nested",
)  # fmt: skip
ACTIVATIONS = {"int8": "q8", "int16": "q16"}


class _Compiler:
    """Collects slots, weights and steps of one graph."""

    def __init__(
        self, context: Context, graph: Graph, weights: Mapping[str, PackedWeight | torch.Tensor], activation: str
    ) -> None:
        self.given = {**weights, **_exact_matrices(graph, weights), **absorbed_stacks(context, graph, weights)}
        self.activation = activation
        graph, derived = with_derived_weights(graph, self.given)
        self.given |= derived
        self.graph = lower(graph, self.kind_of, self.format_of)
        planned = assign_slots(self.graph)
        self.slot_of: Mapping[Value, int] = planned.slot_of
        self.slots = [Slot(SLOT_KINDS[s.kind], s.width, int(s.selected), s.repeat) for s in planned.slots]
        self.weights: list[Weight] = []
        self.keep: list[Any] = []
        self.index: dict[str, int] = {}
        self.rope = dynamic_rope(graph)

    def matrix(self, name: str) -> PackedWeight:
        try:
            weight = self.given[name]
        except KeyError:
            raise BackendError(f"the graph needs weight {name!r}, which the model does not have") from None
        if not isinstance(weight, PackedWeight):
            raise BackendError(f"weight {name!r} must be packed for the cpu backend, got a {type(weight).__name__}")
        return weight

    def format_of(self, name: str) -> str:
        return self.matrix(name).format

    def kind_of(self, name: str) -> str:
        return row_kind(self.format_of(name), self.activation)

    def weight(self, name: str | None) -> int:
        """Index of a weight in the plan's table; it is added at its first use."""
        if name is None:
            return -1
        if name not in self.index:
            weight = self.given.get(name)
            if isinstance(weight, torch.Tensor):
                self._add(name, self._vector(weight))
            else:
                matrix = self.matrix(name)
                self.keep.append(matrix.data)
                self._add(name, stack_struct(matrix) if isinstance(matrix, PackedStack) else weight_struct(matrix))
        return self.index[name]

    def _add(self, name: str, weight: Weight) -> None:
        self.index[name] = len(self.weights)
        self.weights.append(weight)

    def _vector(self, tensor: torch.Tensor) -> Weight:
        if tensor.ndim != 1:
            raise BackendError(f"the weight must be a vector, got shape {tuple(tensor.shape)}")
        vector = tensor.detach().to("cpu", torch.float32).contiguous()
        self.keep.append(vector)
        place = address(vector, "a vector", torch.float32, tuple(tensor.shape))
        return Weight(VECTOR, 1, vector.numel(), 0, place, vector.numel() * 4)

    def frequencies(self, spec: Any) -> int:
        name = f"rope:{id(spec)}"
        if name not in self.index:
            self._add(name, self._vector(torch.as_tensor(spec.inv_freq, dtype=torch.float32, device="cpu").clone()))
        return self.index[name]

    def axes(self, spec: Any) -> int:
        name = f"axes:{id(spec)}"
        if name not in self.index:
            self._add(name, self._vector(torch.tensor(spec.axes, dtype=torch.float32, device="cpu")))
        return self.index[name]

    def step(self, node: Node) -> Step:
        a, spec = node.attrs, spec_of(node)
        if spec.code is None:
            raise BackendError(f"the cpu backend does not support op {node.op!r}")
        s = Step()
        s.op = spec.code
        self._operands(s, node)
        s.scale = 1.0
        if isinstance(cache := self.graph.cache, LatentSpec):
            s.rank, s.rope = cache.rank, cache.rope
        for attr in spec.attrs:
            if attr.step_field:
                setattr(s, attr.step_field, attr.of(node))
        if node.op in ("rope_table", "compress"):
            s.scale = a["rope"].scaling
        elif node.op == "index_write":
            s.index = node.inputs[0].width
        elif node.op == "attention" and len(node.inputs) > 1:
            s.top_k = node.inputs[1].width // a["kv_heads"]
        s.flags = sum(FLAGS[flag] for flag in _flags(spec, node))
        if node.op == "hidden_out" and a["index"] == self.graph.hidden_states - 1:
            s.flags |= FLAGS["last"]
        elif node.op == "lookup":
            s.flags |= FLAGS["ids"]
        return s

    def _operands(self, s: Step, node: Node) -> None:
        """Sets the slots of inputs and outputs and the indices of weights and biases; -1 if absent."""
        a = node.attrs
        inputs = [self.slot_of[v] for v in node.inputs]
        outputs = [self.slot_of[v] for v in node.outputs]
        if node.op == "mla_attention" and a["form"] == "expanded":  # without the operands of the absorbed form
            inputs, outputs = [inputs[0], -1, *inputs[1:]], [-1, *outputs]
        weights = [self.weight(name) for name in node.weights]
        biases = [self.weight(name) for name in a.get("biases") or ((a["bias"],) if a.get("bias") else ())]
        if node.op in ("rope_table", "compress"):
            weights.append(self.frequencies(a["rope"]))
            weights += [self.axes(a["rope"])] if node.op == "rope_table" and a["rope"].axes else []
        elif node.op == "layer_norm":
            weights, biases = weights[:1], weights[1:]
        for field, values in (s.inputs, inputs), (s.outputs, outputs), (s.w, weights), (s.b, biases):
            field[:] = values + [-1] * (len(field) - len(values))

    def row(self, node: Node) -> dict[str, Any]:
        """A step's row in the report."""
        row: dict[str, Any] = {"op": node.op, "output": node.outputs[0].name if node.outputs else None}
        matrices = [n for n in node.weights if isinstance(self.given.get(n), PackedWeight)]
        if matrices:
            row["weights"] = list(matrices)
            row["format"] = ",".join(dict.fromkeys(self.format_of(n) for n in matrices))
            row["bytes"] = sum(self.matrix(n).nbytes for n in matrices)
        if absorbs(node):  # prefill reads kv_b itself to expand; decode reads its stacks in the steps around this one
            row["prefill_bytes"] = row.pop("bytes")
        row |= {name: node.attrs[name] for name in ("experts", "top_k") if node.op.startswith("experts")}
        if node.inputs and node.inputs[0].kind != "f32":
            row["activation"] = node.inputs[0].kind
        if node.outputs and node.outputs[-1].kind != "f32":
            row["writes"] = node.outputs[-1].kind
        if node.op == "attention":
            row["softmax"] = node.attrs.get("softmax", "eager")
        if node.op == "mla_attention":
            absorbed = node.attrs["form"] == "absorbed"
            row["form"] = "absorbed (decode), cheaper form (prefill)" if absorbed else "expanded"
            if node.attrs.get("top_k"):
                row["form"] += f"; sparse (absorbed) beyond {node.attrs['top_k']} tokens"
            if node.attrs.get("window"):
                row["form"] += f"; the last {node.attrs['window']} tokens and the first {node.attrs['sinks']}"
        return row


def row_kind(format_name: str, activation: str) -> str:
    """Slot kind of the input rows of a product with a matrix in this format; `activation` as in `CompileOptions`."""
    if activation in ACTIVATIONS and format_name in INTEGER_FORMATS:
        return ACTIVATIONS[activation]
    return get_format(format_name).activation


def _flags(spec: OpSpec, node: Node) -> list[str]:
    """Names of the flags that the node's attributes set."""
    return [flag for attr in spec.attrs for flag in attr.flags_of(node)]


def _exact_matrices(graph: Graph, weights: Mapping[str, PackedWeight | torch.Tensor]) -> Mapping[str, PackedMatrix]:
    """Matrices that are never quantized, as fp32: their products decide which experts and which tokens are chosen."""
    floats = {n: w for n in exact_weights(graph) if isinstance(w := weights.get(n), torch.Tensor) and w.ndim == 2}
    return {n: pack(w.detach().to("cpu", torch.float32), "fp32") for n, w in floats.items()}


def compile_graph(
    context: Context, graph: Graph, weights: Mapping[str, PackedWeight | torch.Tensor], *, activation: str = "auto"
) -> CpuPlan:
    """Binds `graph` to `weights` on this context.

    Args:
        context: the library's context that runs the plan.
        graph: the graph, before lowering.
        weights: matrices and stacks of them packed, vectors as 1-D tensors (copied to fp32), `exact_weights` as either.
        activation: format of the input rows of integer products: "auto" (the default of each weight format), "int8" or
            "int16".

    Raises:
        BackendError: a weight is missing or not packed, or the graph has an unsupported op.
    """
    compiler = _Compiler(context, graph, weights, activation)
    nodes = compiler.graph.nodes
    steps = [compiler.step(n) for n in nodes]
    if graph.has_head:
        compiler.slots[compiler.slot_of[nodes[-1].outputs[0]]].kind = SLOT_KINDS["logits"]
    return CpuPlan(
        context, steps, compiler.slots, compiler.weights, compiler.keep, [compiler.row(n) for n in nodes],
        vocab_size=graph.logits_width, hidden_size=graph.hidden_size, hidden_states=graph.hidden_states,
        draft_width=graph.draft_width if any(n.op == "draft_out" for n in nodes) else 0, rope=compiler.rope,
        has_head=graph.has_head, has_states=bool(graph.states), looks_up=graph.looks_up,
        features=graph.features,
    )  # fmt: skip
