"""A graph bound to weights on a device: executes the nodes in order, each by one or a few kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...errors import BackendError
from ...graph.analysis import hidden_only
from ...graph.cache_groups import group_spans
from ...graph.ir import Graph, Node, Value
from ...graph.ops.grids import IN_GRIDS
from ...graph.planner import assign_slots
from ...quant.packed import PackedWeight
from ..base import DEFAULTS, Backend, CompileOptions, KvStore, Plan, StepBatch, StepOutput
from ..decode_one import decode_one
from ..decoding import DecodeCall, Decoded, DraftedCall, DraftedRounds
from ..drafted_round import drafted_round
from ..reference.checks import StepNeeds, check_step
from ..reference.device_choice import choose_on_device, greedy_tokens
from ..sampling import TokenChoice, choose_tokens
from .adapter_ops import ADAPTER_OPS
from .adapters import CudaAdapters
from .alternative import Alternative, Chosen, ProductShape
from .bind import weights_on_device
from .buckets import MOST_ROWS, may_be_captured
from .captured import CapturedSteps, Pieces, Results, launched
from .compressed_ops import COMPRESSED_OPS
from .decoding_step import DecodingSteps, decodes
from .device import Device
from .division import DEFAULT, HEAD_ROWS, LATENT_ROWS, Division, query_rows
from .expert_ops import EXPERT_OPS
from .grid_ops import GRID_OPS
from .host_experts import HostExperts
from .host_graph import divide
from .kernels.rows import select_rows
from .latent_ops import LATENT_OPS
from .memory import memory_errors
from .ops import DENSE_OPS, Op, Run, frequencies_name, ropes
from .recurrent_ops import RECURRENT_OPS
from .sizes import PRODUCTS, plan_bytes, reserved_rows
from .states import DeviceStates
from .step import DeviceStep, StepIntegers
from .store import DeviceBlocks
from .stores import store_class
from .supported import check_graph_ops

OPS: Mapping[str, Op] = {**DENSE_OPS, **EXPERT_OPS, **LATENT_OPS, **RECURRENT_OPS, **COMPRESSED_OPS, **GRID_OPS, **ADAPTER_OPS}

_STEP_REMEDY = (
    "set a smaller kv_cache_memory, which leaves more for steps, or a smaller prefill_chunk or batch_size_range, or load the "
    "model in a smaller format"
)


class CudaPlan:
    """Implements `Plan`. Created by `CudaBackend.compile`.

    Values are float32 rows in buffers that values which are never alive together share (`graph/planner.py`); they grow with the
    largest step and are kept. Only the integers of a step go to the device, in one copy. Of a captured step, the likeliest
    tokens come back before `run` returns, so that choosing tokens need not wait for the device again.

    Args:
        graph, weights: as in `Backend.compile`.
        device: the device that it runs on.
        captured: whether small steps are captured and replayed, if the device supports it.
        options: as in `Backend.compile`.
        host: creates the backend that computes `options.host_experts`.
        division: how work is divided, in all steps.
        coded: whether products of more than four rows with FP8 weights round rows to E4M3.
        alternatives: what may take the place of own products of many rows.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, PackedWeight | torch.Tensor],
        device: Device,
        captured: bool = True,
        options: CompileOptions = DEFAULTS,
        host: Callable[[], Backend] | None = None,
        division: Division = DEFAULT,
        coded: bool = False,
        alternatives: tuple[Chosen, ...] = (),
    ) -> None:
        check_graph_ops(graph)
        graph, layers = divide(graph, options.host_experts)
        self._host: HostExperts | None = None
        if layers:
            assert host is not None  # `CudaBackend` has one
            self._host = HostExperts(layers, weights, host(), device, options)
        self.graph, self.device, self._device = graph, device.device, device
        self._weights = weights_on_device(graph, weights, self.device, division, coded, alternatives)
        self.division = division
        self._coded, self._alternatives = coded, alternatives
        self._formats = {name: weight.format for name in graph.weights() if isinstance(weight := weights[name], PackedWeight)}
        self._spans, self._needs = group_spans(graph), StepNeeds.of(graph)
        self._only_hidden = hidden_only(graph)
        self._only_earlier = hidden_only(graph, wanted=(graph.hidden_states - 1,))
        planned = assign_slots(graph)
        self._slots, self._slot_of = planned.slots, planned.slot_of
        self._buffers = [self._empty(0, slot.width) for slot in planned.slots]
        self._head = next((node.outputs[0] for node in graph.nodes if node.op == "lm_head"), None)
        self._block_q = _query_rows(graph)
        self._dynamic = {frequencies_name(spec): spec for spec in ropes(graph) if spec.is_dynamic}
        self._both_sides = any(node.op == "encoder_attention" for node in graph.nodes)
        in_grids = any(node.op in IN_GRIDS for node in graph.nodes)
        self._axes = in_grids or any(spec.axes for spec in ropes(graph))
        self._staging = device.staging(0)
        # Whether steps have further integers than those of every graph.
        self._varied = bool(self._dynamic or self._axes or graph.states)
        self._decoding = DecodingSteps(len(self._spans), self._block_q)
        self.captured = CapturedSteps(device) if captured and device.captures else None
        self._captured_logits = self._empty(0, graph.logits_width)
        self._greedy = device.staging(MOST_ROWS)  # the likeliest tokens of the last captured step, on the host
        self._chosen_from: tuple[Callable[[], torch.Tensor | None], int] | None = None  # its logits, and their version
        self._chosen: tuple[Callable[[], torch.Tensor | None], int, list[int]] | None = None  # the same with these tokens

    @torch.no_grad()
    def run(self, batch: StepBatch, store: KvStore | None) -> StepOutput:
        """Runs one step over a store of this backend."""
        blocks, slots = (0, 0) if store is None else (store.num_blocks, store.num_states)
        check_step(batch, self._needs, blocks, self._spans, slots)
        wanted = store_class(self.graph.cache)
        if store is not None and not isinstance(store, wanted):
            raise BackendError(f"store: the plan needs a {wanted.__name__} of its backend, got a {type(store).__name__}")
        adapters = self._adapters_of(batch)
        logits = self._given_logits(batch)
        with self._device.step(), memory_errors(f"a step of {len(batch.positions)} tokens on {self.device}", _STEP_REMEDY):
            self._chosen, self._chosen_from = None, None
            if self._host is not None:
                self._host.begin(batch)
            if store is not None:
                store.ensure(int(batch.block_table.max()) + 1)
                if isinstance(store.states, DeviceStates):
                    store.states.ensure()
            whole = adapters is not None or not self.graph.adapter_sites  # otherwise steps of one bucket differ
            if self.captured is not None and store is not None and whole and may_be_captured(batch):
                output = self._replayed(batch, store, self.captured, logits, adapters)
            else:
                output = self._launched(batch, store, logits, adapters)
            self._device.wait()
            if self._chosen_from is not None:
                self._chosen = (*self._chosen_from, self._greedy[: len(batch.logit_rows)].tolist())
        return output

    def _adapters_of(self, batch: StepBatch) -> CudaAdapters | None:
        """The store of the step's adapters; None: it has none, or the graph takes none."""
        if not self.graph.adapter_sites or batch.adapter_of is None:
            return None
        if not isinstance(batch.adapters, CudaAdapters):
            found = type(batch.adapters).__name__
            raise BackendError(f"step.adapters: the plan needs a CudaAdapters of its backend, got a {found}")
        return batch.adapters

    def _launched(
        self, batch: StepBatch, store: DeviceBlocks | None, given: torch.Tensor | None, adapters: CudaAdapters | None
    ) -> StepOutput:
        integers = self._integers(batch, None)
        memory = torch.empty(integers.size, dtype=torch.int32, device=self.device)
        self._upload(integers, memory)
        logits = self._empty(len(batch.logit_rows), self.graph.logits_width) if given is None else given
        asks = batch.last_hidden or batch.draft_states
        run = Run(batch, integers.on(memory, self.division), store, self._weights, batch.hidden or asks, adapters=adapters)
        results = launched(self._pieces(run, logits, batch.hidden))
        states = self.graph.hidden_states
        hidden = torch.stack([results.hidden[i] for i in range(states)]) if batch.hidden else None
        return _output(batch, logits, results.hidden[states - 1] if asks else None, hidden, results.drafts)

    def _replayed(
        self,
        batch: StepBatch,
        store: DeviceBlocks,
        captured: CapturedSteps,
        given: torch.Tensor | None,
        adapters: CudaAdapters | None,
    ) -> StepOutput:
        """A step with padding rows, whose results are copied: the next step overwrites them."""
        integers = self._integers(batch, store.scratch)
        bucket = integers.bucket
        if bucket.logit_rows > len(self._captured_logits):
            self._captured_logits = self._empty(bucket.logit_rows, self.graph.logits_width)  # more than `reserve` was told

        def launch(at: DeviceStep) -> Pieces:
            run = Run(None, at, store, self._weights, bucket.states, adapters=adapters)
            made = yield from self._pieces(run, self._captured_logits[: bucket.logit_rows], False)
            made.greedy = greedy_tokens(made.logits).to(torch.int32) if bucket.logit_rows else None
            return made

        further = () if adapters is None else (adapters.table.data_ptr(),)
        results = captured.run(integers, store, self._upload, launch, further, self.division)
        rows, tokens = len(batch.logit_rows), len(batch.positions)
        logits = self._empty(rows, self.graph.logits_width) if given is None else given
        logits.copy_(results.logits[:rows])
        if results.greedy is not None:
            self._device.download(results.greedy[:rows], self._greedy[:rows])
            self._chosen_from = None if logits.is_inference() else (weakref.ref(logits), logits._version)
        last = results.hidden[self.graph.hidden_states - 1][:tokens].clone() if bucket.states else None
        drafts = results.drafts[:tokens].clone() if bucket.states and results.drafts is not None else None
        return _output(batch, logits, last, None, drafts)

    def _integers(self, batch: StepBatch, scratch: int | None) -> StepIntegers:
        slots = batch.adapters.slots if self._adapters_of(batch) is not None and batch.adapters is not None else 0
        if scratch is not None and not slots and not self._varied and decodes(batch):
            return self._decoding.of(batch, scratch)
        if self._both_sides:  # each row sees all tokens of its sequence
            batch = replace(batch, visible_to=np.repeat(batch.query_len, batch.query_len))
        states = bool(self.graph.states)
        return StepIntegers.of(batch, len(self._spans), self._block_q, self._dynamic, scratch, states, self._axes, slots)

    def _upload(self, integers: StepIntegers, memory: torch.Tensor) -> None:
        if integers.size > len(self._staging):
            self._staging = self._device.staging(2 * integers.size)
        host = self._staging[: integers.size]
        integers.write(host.numpy())
        self._device.upload(host, memory)

    def _pieces(self, run: Run, logits: torch.Tensor, all_hidden: bool) -> Pieces:
        """Executes the nodes, in one piece, or in several with what the host does for experts that it computes. Nothing else
        waits for the device.

        Args:
            logits: what the logits are written to.
            all_hidden: whether all hidden states are returned, and not the last one alone.
        """
        unwanted = self._only_earlier if run.wants_hidden else self._only_hidden
        between: list[Callable[[], None]] = []
        for i, node in enumerate(self.graph.nodes):
            if i in unwanted and not all_hidden:
                continue
            if node.op == "experts_receive":
                assert self._host is not None
                between.append(self._host.receive(node.attrs["weight"], self._rows(node.outputs[0], run.at)))
                continue
            if between:
                yield between
                between = []
            self._execute(run, node, logits)
            if node.op == "experts_send":
                assert self._host is not None
                between.append(self._host.send(self._rows(node.outputs[0], run.at)))
        if between:
            yield between
        if self._head is not None and not self._head.selected:
            select_rows(run.at.logit_rows, self._rows(self._head, run.at), logits)
        return Results(logits, run.hidden, run.drafts, held=tuple(self._buffers))

    def _execute(self, run: Run, node: Node, logits: torch.Tensor) -> None:
        inputs = [self._rows(value, run.at) for value in node.inputs]
        direct = node.op == "lm_head" and node.outputs[0].selected
        outputs = [logits if direct else self._rows(value, run.at) for value in node.outputs]
        OPS[node.op](run, node, inputs, outputs)

    def _rows(self, value: Value, at: DeviceStep) -> torch.Tensor:
        """The buffer of a value, float32 [T or R, width], or with `repeat` rows per token [T * repeat, width]."""
        index, rows = self._slot_of[value], value.repeat * len(at.logit_rows if value.selected else at.positions)
        self._grow(index, rows)
        return self._buffers[index][:rows]

    def _grow(self, index: int, rows: int) -> None:
        """Captured steps hold the buffers that they were launched with."""
        if rows > len(self._buffers[index]):
            self._buffers[index] = self._empty(rows, self._slots[index].width)

    def _empty(self, rows: int, width: int) -> torch.Tensor:
        with torch.inference_mode(False):  # later steps may write to it outside of inference mode
            return torch.empty(rows, width, dtype=torch.float32, device=self.device)

    def _given_logits(self, batch: StepBatch) -> torch.Tensor | None:
        """The caller's tensor for logits, which is checked, as kernels would write past its end."""
        shape = len(batch.logit_rows), self.graph.logits_width
        given = batch.logits
        if given is None:
            return None
        if given.shape != shape or given.dtype != torch.float32 or not given.is_contiguous():
            raise BackendError(
                f"step.logits: must be contiguous float32 {list(shape)}, got {given.dtype} {list(given.shape)} with strides "
                f"{list(given.stride())}"
            )
        if (given.device.type, given.device.index or 0) != (self.device.type, self.device.index or 0):
            raise BackendError(f"step.logits: must be on {self.device}, as the plan is, got a tensor on {given.device}")
        return given

    def choose_tokens(self, logits: torch.Tensor, choices: Sequence[TokenChoice | None]) -> list[int | None]:
        chosen = self._chosen  # another thread's step may replace it
        with memory_errors(f"the choice of {len(choices)} tokens on {self.device}", _STEP_REMEDY):
            if chosen is not None and chosen[0]() is logits and logits._version == chosen[1]:
                return choose_on_device(logits, choices, chosen[2])
            return choose_tokens(logits.numpy(), choices) if logits.is_cpu else choose_on_device(logits, choices)

    def decode(self, batch: StepBatch, store: KvStore, call: DecodeCall) -> Decoded:
        return decode_one(self, batch, store, call)

    def decode_drafted(
        self, batch: StepBatch, drafter: Plan, pending: StepBatch, store: KvStore, call: DraftedCall
    ) -> DraftedRounds:
        return drafted_round(self, batch, drafter, pending, store, call)

    def check_weights(self) -> None:
        """Of weights in the host's memory; the others are copies on the device."""
        if self._host is not None:
            self._host.check_weights()

    def reserve(self, tokens: int, logit_rows: int) -> None:
        tokens, logit_rows = reserved_rows(tokens, logit_rows, self.captured is not None)
        if self.captured is not None and logit_rows > len(self._captured_logits):
            self._captured_logits = self._empty(min(logit_rows, MOST_ROWS), self.graph.logits_width)
        kept = {self._slot_of[value] for node in self.graph.nodes if node.op == "lm_head" for value in node.outputs}
        for index, slot in enumerate(self._slots):
            if index not in kept:
                self._grow(index, slot.repeat * (logit_rows if slot.selected else tokens))
        if self._host is not None:
            self._host.reserve(tokens)

    def buffer_bytes(self, tokens: int, logit_rows: int) -> int:
        captured = self.captured is not None
        return plan_bytes(
            self.graph, self._formats, tokens, logit_rows, captured, self.division, self._coded, self._alternatives
        )

    def describe(self) -> list[dict[str, Any]]:
        return [self._description(node) for node in self.graph.nodes]

    def _description(self, node: Node) -> dict[str, Any]:
        row: dict[str, Any] = {"op": node.op, "kernel": "triton", "output": node.outputs[0].name if node.outputs else None}
        matrices = [name for name in node.weights if name in self._formats]
        if matrices:
            row["weights"] = matrices
            row["format"] = ",".join(dict.fromkeys(self._formats[name] for name in matrices))
            if any(tiles.layout.coded for name in matrices for tiles in self._weights.tiles_of(name)):
                row["activation"] = "e4m3"
            if others := self._alternatives_of(node):
                row["alternative"] = ", ".join(others)
            row["bytes"] = sum(tiles.words.nbytes for name in matrices for tiles in self._weights.tiles_of(name))
        if node.op == "experts_receive" and self._host is not None:
            row |= {"kernel": "cpu", **self._host.describe(node.attrs["weight"])}
        return row

    def fits(self, alternative: Alternative) -> bool:
        """Whether an alternative can compute any product of the plan."""
        nodes = [node for node in self.graph.nodes if node.op in PRODUCTS]
        return any(alternative.fits(shape) for node in nodes for shape in self._product_shapes(node))

    def _product_shapes(self, node: Node) -> list[ProductShape]:
        return [product.matrix.shape_of_product for product in self._weights.products(node)]

    def _alternatives_of(self, node: Node) -> list[str]:
        """What may compute products of a node instead of the kernel, and from how many rows on."""
        if node.op not in PRODUCTS:
            return []
        shapes = self._product_shapes(node)
        return [
            f"{each.alternative.name} from {each.rows} rows"
            for each in self._alternatives
            if any(each.alternative.fits(shape) for shape in shapes)
        ]


def _query_rows(graph: Graph) -> int:
    """Rows of a tile in prefill."""
    shared = [node for node in graph.nodes if node.op in ("mla_attention", "compressed_attention")]  # one key for all heads
    latent = [min(HEAD_ROWS, node.attrs["heads"]) for node in shared]
    if any(len(node.inputs) > 1 for node in shared):
        return 1  # each row attends to tokens of its own
    if latent:
        return query_rows(max(latent), LATENT_ROWS)
    if any(node.op == "attention" and len(node.inputs) > 1 for node in graph.nodes):
        return 1  # as well, to blocks
    plain = [node.attrs for node in graph.nodes if node.op in ("attention", "encoder_attention")]
    groups = [attrs["heads"] // attrs["kv_heads"] for attrs in plain]
    return query_rows(max(groups, default=1))


def _output(
    batch: StepBatch,
    logits: torch.Tensor,
    last: torch.Tensor | None,
    hidden: torch.Tensor | None,
    drafts: torch.Tensor | None,
) -> StepOutput:
    drafts = last if drafts is None else drafts
    return StepOutput(logits, hidden, last if batch.last_hidden else None, drafts if batch.draft_states else None)
