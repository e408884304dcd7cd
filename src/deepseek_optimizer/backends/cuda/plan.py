"""A graph bound to weights on a device: executes the nodes in order, each by one or a few kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import BackendError
from ...graph.analysis import hidden_only
from ...graph.cache_groups import group_spans
from ...graph.ir import Graph, Node, Value
from ...graph.planner import assign_slots
from ...quant.packed import PackedWeight
from ..base import KvStore, Plan, StepBatch, StepOutput
from ..decode_one import decode_one
from ..decoding import DecodeCall, Decoded, DraftedCall, DraftedRounds
from ..drafted_round import drafted_round
from ..reference.checks import check_batch
from ..reference.plan import choose_on_device
from ..sampling import TokenChoice, choose_tokens
from .bind import weights_on_device
from .device import launching_on
from .division import HEAD_ROWS, LATENT_ROWS, query_rows
from .expert_ops import EXPERT_OPS
from .kernels.rows import select_rows
from .latent_ops import LATENT_OPS
from .ops import DENSE_OPS, Op, Run
from .sizes import plan_bytes
from .step import DeviceStep
from .stores import store_class
from .supported import check_graph_ops

OPS: Mapping[str, Op] = {**DENSE_OPS, **EXPERT_OPS, **LATENT_OPS}


class CudaPlan:
    """Implements `Plan`. Created by `CudaBackend.compile`.

    Values are float32 rows in buffers that values which are never alive together share (`graph/planner.py`); they grow with the
    largest step and are kept. Only the integers of a step go to the device, in one copy.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, PackedWeight | torch.Tensor], device: torch.device) -> None:
        check_graph_ops(graph)
        self.graph, self.device = graph, device
        self._weights = weights_on_device(graph, weights, device)
        self._formats = {name: weight.format for name in graph.weights() if isinstance(weight := weights[name], PackedWeight)}
        self._spans = group_spans(graph)
        self._only_hidden = hidden_only(graph)
        self._only_earlier = hidden_only(graph, wanted=(graph.hidden_states - 1,))
        planned = assign_slots(graph)
        self._slots, self._slot_of = planned.slots, planned.slot_of
        self._buffers = [torch.empty(0, slot.width, dtype=torch.float32, device=device) for slot in planned.slots]
        self._head = next((node.outputs[0] for node in graph.nodes if node.op == "lm_head"), None)
        self._block_q = _query_rows(graph)

    @torch.no_grad()
    def run(self, batch: StepBatch, store: KvStore | None) -> StepOutput:
        """Runs one step over a store of this backend."""
        with launching_on(self.device):
            output = self._run(batch, store)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return output

    def _run(self, batch: StepBatch, store: KvStore | None) -> StepOutput:
        check_batch(batch, self.graph, 0 if store is None else store.num_blocks, self._spans)
        if store is not None:
            wanted = store_class(self.graph.cache)
            if not isinstance(store, wanted):
                raise BackendError(f"store: the plan needs a {wanted.__name__} of its backend, got a {type(store).__name__}")
            store.ensure(int(batch.block_table.max()) + 1)
        asks = batch.last_hidden or batch.draft_states
        at = DeviceStep.of(batch, len(self._spans), self._block_q, self.device)
        run = Run(batch, at, store, self._weights, batch.hidden or asks)
        logits = self._logits_buffer(batch)
        unwanted = self._only_earlier if asks else self._only_hidden
        for i, node in enumerate(self.graph.nodes):
            if batch.hidden or i not in unwanted:
                self._execute(run, node, logits)
        if self._head is not None and not self._head.selected:
            select_rows(at.logit_rows, self._rows(self._head, batch), logits)
        hidden = torch.stack([run.hidden[i] for i in range(self.graph.hidden_states)]) if batch.hidden else None
        last = run.hidden[self.graph.hidden_states - 1] if asks else None
        return StepOutput(logits, hidden, last if batch.last_hidden else None, last if batch.draft_states else None)

    def _execute(self, run: Run, node: Node, logits: torch.Tensor) -> None:
        inputs = [self._rows(value, run.batch) for value in node.inputs]
        direct = node.op == "lm_head" and node.outputs[0].selected
        outputs = [logits if direct else self._rows(value, run.batch) for value in node.outputs]
        OPS[node.op](run, node, inputs, outputs)

    def _rows(self, value: Value, batch: StepBatch) -> torch.Tensor:
        """The buffer of a value, float32 [T or R, width], or with `repeat` rows per token [T * repeat, width]."""
        index, rows = self._slot_of[value], value.repeat * len(batch.logit_rows if value.selected else batch.positions)
        self._grow(index, rows)
        return self._buffers[index][:rows]

    def _grow(self, index: int, rows: int) -> None:
        if rows > len(self._buffers[index]):
            width = self._slots[index].width
            self._buffers[index] = torch.empty(rows, width, dtype=torch.float32, device=self.device)

    def _logits_buffer(self, batch: StepBatch) -> torch.Tensor:
        """The tensor that the step's logits are written to, [R, V]; R is 0 if the graph has no head. The caller's is checked,
        as kernels would write past its end."""
        shape = len(batch.logit_rows), self.graph.logits_width
        given = batch.logits
        if given is None:
            return torch.empty(shape, dtype=torch.float32, device=self.device)
        if given.shape != shape or given.dtype != torch.float32 or not given.is_contiguous():
            raise BackendError(
                f"step.logits: must be contiguous float32 {list(shape)}, got {given.dtype} {list(given.shape)} with strides "
                f"{list(given.stride())}"
            )
        if given.device.type != self.device.type:
            raise BackendError(f"step.logits: must be on {self.device}, as the plan is, got a tensor on {given.device}")
        return given

    def choose_tokens(self, logits: torch.Tensor, choices: Sequence[TokenChoice | None]) -> list[int | None]:
        return choose_tokens(logits.numpy(), choices) if logits.is_cpu else choose_on_device(logits, choices)

    def decode(self, batch: StepBatch, store: KvStore, call: DecodeCall) -> Decoded:
        return decode_one(self, batch, store, call)

    def decode_drafted(
        self, batch: StepBatch, drafter: Plan, pending: StepBatch, store: KvStore, call: DraftedCall
    ) -> DraftedRounds:
        return drafted_round(self, batch, drafter, pending, store, call)

    def check_weights(self) -> None:
        """Does nothing: the weights are copies on the device."""

    def reserve(self, tokens: int, logit_rows: int) -> None:
        kept = {self._slot_of[value] for node in self.graph.nodes if node.op == "lm_head" for value in node.outputs}
        for index, slot in enumerate(self._slots):
            if index not in kept:
                self._grow(index, slot.repeat * (logit_rows if slot.selected else tokens))

    def buffer_bytes(self, tokens: int, logit_rows: int) -> int:
        return plan_bytes(self.graph, self._formats, tokens, logit_rows)

    def describe(self) -> list[dict[str, Any]]:
        return [self._description(node) for node in self.graph.nodes]

    def _description(self, node: Node) -> dict[str, Any]:
        row: dict[str, Any] = {"op": node.op, "kernel": "triton", "output": node.outputs[0].name if node.outputs else None}
        matrices = [name for name in node.weights if name in self._formats]
        if matrices:
            row["weights"] = matrices
            row["format"] = ",".join(dict.fromkeys(self._formats[name] for name in matrices))
            row["bytes"] = sum(tiles.words.nbytes for name in matrices for tiles in self._weights.tiles_of(name))
        return row


def _query_rows(graph: Graph) -> int:
    """Rows of a tile in prefill."""
    latent = [min(HEAD_ROWS, node.attrs["heads"]) for node in graph.nodes if node.op == "mla_attention"]
    if any(node.op == "mla_attention" and len(node.inputs) > 1 for node in graph.nodes):
        return 1  # each row attends to tokens of its own
    if latent:
        return query_rows(max(latent), LATENT_ROWS)
    groups = [node.attrs["heads"] // node.attrs["kv_heads"] for node in graph.nodes if node.op == "attention"]
    return query_rows(max(groups, default=1))
