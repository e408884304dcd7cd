"""Backend `cpu` in a process that runs some layers of a model, and in the first one, which also starts steps in the others.

What is above backends sees only the first one's, whose plan and store stand for those of all processes. The first process hands
each of the others the hidden rows before its layers and takes those after them, so it is the only one that waits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn

import torch

from ...errors import RankLostError, UnsupportedRequestError
from ...graph.ir import Graph
from ...graph.parallel.pipeline import Stage, divided_as, on_first
from ...graph.rope_rotation import KeyRotation
from ...quant.packed import PackedWeight
from ..base import DEFAULTS, Capabilities, CompileOptions, Int32, KvStore, Plan, StepBatch, StepOutput
from ..cpu import CpuBackend, CpuPlan, CpuStore
from ..decoding import DecodeCall, Decoded, DraftedCall, DraftedRounds
from ..drafted_round import drafted_round
from ..qualities import Quality
from ..stage_batch import layer_batch, tail_batch
from ..wrapped_plan import WrappedPlan
from .links import Links
from .shared_plans import SharedPlans


class StageBackend(CpuBackend):
    """Implements `Backend` for the process of one stage.

    Args:
        isa, threads: as for `CpuBackend`; threads of this process.
        stages: those of all processes.
        rank: of this process.
        one_host: whether all processes share the memory of one machine.
        links: of rank 0 the other processes; None in these.
    """

    def __init__(
        self,
        isa: str | None,
        threads: int | None,
        stages: list[Stage],
        rank: int,
        one_host: bool,
        links: Links | None = None,
    ) -> None:
        super().__init__(isa, threads)
        self.stages, self.rank, self.leader, self.one_host = stages, rank, links, one_host
        self.plans = SharedPlans(len(stages), links)  # of this stage

    @property
    def stage(self) -> Stage:
        """This process's."""
        return self.stages[self.rank]

    @property
    def capabilities(self) -> Capabilities:
        able = super().capabilities
        return replace(able, training=False, adapters=False, drafted_calls=False, dense_operations=False)

    @property
    def detail(self) -> str:
        layers = ", ".join(str(len(stage.cached)) for stage in self.stages)
        return f"{self.isa}, {len(self.stages)} stages of {layers} layers, {self.threads} threads"

    def weights_in(self, graph: Graph) -> list[str]:
        """The names of those weights of a graph that this process has."""
        if not _has_layers_of_others(graph, self.stages):
            return graph.weights()
        return self.stage.weights()

    def compile(  # type: ignore[override]  # the first one's plan is around several
        self, graph: Graph, weights: Mapping[str, PackedWeight | torch.Tensor], options: CompileOptions = DEFAULTS
    ) -> Plan:
        """Binds this process's layers of `graph`; of a graph that begins with hidden rows (an MTP layer) the whole, in rank 0.

        Raises:
            UnsupportedRequestError: the graph is not the one that the other processes have.
        """
        if self.rank == 0 and not _has_layers_of_others(graph, self.stages):
            return OwnPlan(super().compile(on_first(graph, self.stage), weights, options))
        self.plans.check(graph)
        stage = divided_as(graph, self.stages)[self.rank]
        plan = super().compile(stage.graph, weights, options)
        number = self.plans.add(graph, plan)
        if self.leader is None or stage.tail is None:
            return plan
        return FirstPlan(number, plan, super().compile(stage.tail, weights, options), self.stages, self.leader)

    def compile_in_all(self, quality: Quality, compile_own: Callable[[], Plan]) -> Plan:
        """Compiles a plan in all processes; in the first one.

        Args:
            quality: of the plan, an argument of the function that `serve_stage` has.
            compile_own: compiles it here.
        """
        return self._in_all(lambda: self.plans.in_all(compile_own), "compile", quality)[0]

    def new_store(  # type: ignore[override]  # the first one's store is around a CpuStore
        self, graph: Graph, kv_dtype: str, num_blocks: int, num_states: int = 0
    ) -> KvStore:
        own = CpuStore(self.context, self.stage.graph.cache, kv_dtype, num_blocks)
        if self.leader is None:
            return own
        return FirstStore(own, kv_dtype, self.stages, self.block_bytes(graph, kv_dtype), self.leader)

    def block_bytes(self, graph: Graph, kv_dtype: str) -> int:
        """Of all processes if they share memory, else of the one that has the most of a block."""
        sizes = [super(StageBackend, self).block_bytes(stage.graph, kv_dtype) for stage in self.stages]
        return sum(sizes) if self.one_host else max(sizes)

    def buffer_bytes(
        self, graph: Graph, formats: Mapping[str, str], options: CompileOptions, tokens: int, logit_rows: int
    ) -> int:
        return super().buffer_bytes(self.stage.graph, formats, options, tokens, logit_rows)

    @property
    def division(self) -> str:
        """How the model is divided, equal only where each rank has the same layers."""
        return f"layers {[stage.cached for stage in self.stages]}"

    def fingerprints(self, whole: bool, own: Callable[[], str]) -> list[str]:
        """Of what each process has, by rank; in the first one.

        Args:
            whole: an argument of the function that `serve_stage` has.
            own: this process's.
        """
        return self._in_all(own, "fingerprint", whole)

    def _in_all(self, own: Callable[[], Any], *message: Any) -> list[Any]:
        """The result of a function here, and the others' answers to a message, by rank."""
        assert self.leader is not None
        links = self.leader

        def ask() -> list[Any]:
            others = range(1, links.ranks)
            for rank in others:
                links.send(rank, *message)
            first = None
            try:
                first = own()
            finally:  # what was asked is answered
                all_ = [first, *(links.answer(rank) for rank in others)]
            return all_

        return links.together(ask)

    def linear(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: modules of other processes have no weights here."""
        raise UnsupportedRequestError(
            f"the model runs in {len(self.stages)} processes, each with some of its layers, so only its plan can run, not "
            "Transformers' own forward (attention weights, hooks, gradients, adapters); load it without parallel"
        )

    linear_gradient = linear


def _has_layers_of_others(graph: Graph, stages: list[Stage]) -> bool:
    others = {name for stage in stages[1:] for name in stage.weights()}
    return any(name in others for name in graph.weights())


class FirstStore:
    """Implements `KvStore`: the stores of all processes, each with some layers of the same blocks.

    Args:
        own: this process's.
        kv_dtype: of all of them.
        stages: of all processes.
        block_bytes: memory of a block, see `StageBackend.block_bytes`.
        links: the other processes.
    """

    num_states = state_bytes = 0

    def __init__(self, own: CpuStore, kv_dtype: str, stages: list[Stage], block_bytes: int, links: Links) -> None:
        self.own, self.stages, self.links = own, stages, links
        self.num_blocks, self.block_bytes, self.number = own.num_blocks, block_bytes, links.new_number()
        message = ("new_store", self.number, kv_dtype, self.num_blocks)
        self._sizes = [own.saved_bytes, *links.together(lambda: self._ask(*message))]

    def __del__(self) -> None:
        if "_sizes" in self.__dict__:
            self.links.drop(self.number)

    def _ask(self, *message: Any) -> list[Any]:
        """The answers of all other processes; within `together`."""
        for rank in range(1, self.links.ranks):
            self.links.send(rank, *message)
        return [self.links.answer(rank) for rank in range(1, self.links.ranks)]

    def _of_rank(self, rank: int, method: str, *arguments: Any) -> Any:
        if rank == 0:
            return getattr(self.own, method)(*arguments)
        return self.links.together(lambda: self.links.ask(rank, "store", self.number, method, arguments))

    def _all(self, method: str, *arguments: Any) -> None:
        getattr(self.own, method)(*arguments)  # raises errors in arguments
        self.links.together(lambda: self._ask("store", self.number, method, arguments))

    @property
    def held_blocks(self) -> int:
        return self.own.held_blocks

    @property
    def held_states(self) -> int:
        return self.own.held_states

    @property
    def saved_bytes(self) -> int:
        return sum(self._sizes)

    def copy_block(self, source: int, target: int) -> None:
        self._all("copy_block", source, target)

    def release(self, from_block: int) -> None:
        """See `KvStore.release`. It may be the last that happens to a model: processes that have ended hold no memory."""
        with suppress(RankLostError):
            self._all("release", from_block)

    def read_block(self, block: int) -> bytes:
        """The contents of all processes, by rank."""
        own = self.own.read_block(block)
        return own + b"".join(self.links.together(lambda: self._ask("store", self.number, "read_block", (block,))))

    def write_block(self, block: int, data: bytes) -> None:
        if len(data) != self.saved_bytes:
            raise ValueError(f"a block has {self.saved_bytes} bytes, got {len(data)}")
        ends = list(itertools.accumulate(self._sizes))
        self.own.write_block(block, data[: ends[0]])
        for rank, (begin, end) in enumerate(itertools.pairwise(ends), 1):
            self._of_rank(rank, "write_block", block, data[begin:end])

    def rotate(self, rotation: KeyRotation, block_table: Int32, tokens: int, position: int, delta: int, group: int = 0) -> None:
        rotation.check(position + tokens)
        for rank, stage in enumerate(self.stages):
            if group in stage.groups:
                own = stage.groups.index(group)
                self._of_rank(rank, "rotate", rotation, block_table, tokens, position, delta, own)

    def read(self, layer: int, block_table: Int32, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        rank = next(rank for rank, stage in enumerate(self.stages) if layer in stage.cached)
        own = self.stages[rank].cached.index(layer)
        rows: tuple[torch.Tensor, torch.Tensor | None] = self._of_rank(rank, "read", own, block_table, tokens)
        return rows

    def copy_state(self, source: int, target: int) -> None:
        """There are no states."""

    def release_states(self, from_slot: int) -> None:
        """There are no states."""

    def read_state(self, slot: int) -> bytes:
        """There are no states."""
        return b""

    def write_state(self, slot: int, data: bytes) -> None:
        """There are no states."""


class FirstPlan(WrappedPlan):
    """Implements `Plan`: the plans of all stages.

    Args:
        number: that all processes know it by.
        first: of this process's layers.
        tail: of what follows the last layer.
        stages: of all processes.
        links: the other processes, which have compiled theirs from the same graph.
    """

    def __init__(self, number: int, first: CpuPlan, tail: CpuPlan, stages: list[Stage], links: Links) -> None:
        super().__init__(tail)
        self._number, self._first, self._tail, self._stages, self._links = number, first, tail, stages, links

    def run(self, batch: StepBatch, store: KvStore | None) -> StepOutput:
        """See `Plan.run`.

        Raises:
            UnsupportedRequestError: hidden states are requested: other processes have those of their layers.
        """
        if batch.hidden:
            raise UnsupportedRequestError(
                f"the model runs in {len(self._stages)} processes, which have the hidden states of their own layers; load it "
                "without parallel for output_hidden_states"
            )
        return self._tail.run(self._links.together(lambda: self._after_layers(batch, store)), None)

    def decode(self, batch: StepBatch, store: KvStore, call: DecodeCall) -> Decoded:
        """See `Plan.decode`. The first process chooses the tokens. Between two steps, only hidden rows are exchanged."""
        assert isinstance(store, FirstStore)
        own, after = layer_batch(batch, self._stages[0].groups, None), tail_batch(batch, None)

        def start() -> list[int]:
            self._links.check()
            self._send("decode", batch, store)
            return self._links.sockets

        def lost(link: int) -> NoReturn:
            self._links.failed(1 + link)

        return self._links.together(lambda: self._tail.decode_after(after, call, self._first, own, store.own, start, lost))

    def _send(self, name: str, batch: StepBatch, store: FirstStore) -> None:
        """Sends a message to all other processes, with what each needs of a batch."""
        sent = replace(batch, logits=None, inputs_embeds=None, adapters=None, adapter_of=None)
        for rank, stage in enumerate(self._stages[1:], 1):
            self._links.send(rank, name, self._number, store.number, layer_batch(sent, stage.groups, None))

    def _after_layers(self, batch: StepBatch, store: KvStore | None) -> StepBatch:
        """Runs the layers of all processes; returns the batch of the tail. The others get the step before this process runs its
        own layers, so that they have read it when the hidden rows arrive."""
        assert isinstance(store, FirstStore)
        self._links.check()
        self._send("run", batch, store)
        others = range(1, len(self._stages))
        try:
            rows = self._first.run(layer_batch(batch, self._stages[0].groups, None), store.own).last_hidden
        except BaseException:
            for rank in others:
                self._links.send_rows(rank, None)
            raise
        for rank in others:
            self._links.send_rows(rank, rows)
            rows = self._links.answer(rank)
        return tail_batch(batch, rows)

    def decode_drafted(
        self, batch: StepBatch, drafter: Plan, pending: StepBatch, store: KvStore, call: DraftedCall
    ) -> DraftedRounds:
        """See `Plan.decode_drafted`."""
        return drafted_round(self, batch, drafter, pending, store, call)

    def check_weights(self) -> None:
        """See `Plan.check_weights`; also raises RankLostError. The other processes check their weights when they run."""
        self._first.check_weights()
        self._tail.check_weights()
        self._links.check()

    def reserve(self, tokens: int, logit_rows: int) -> None:
        """See `Plan.reserve`."""
        self._first.reserve(tokens, 0)
        self._tail.reserve(tokens, logit_rows)

    def buffer_bytes(self, tokens: int, logit_rows: int) -> int:
        """See `Plan.buffer_bytes`; of this process."""
        return self._first.buffer_bytes(tokens, 0) + self._tail.buffer_bytes(tokens, logit_rows)

    def describe(self) -> list[dict[str, Any]]:
        """See `Plan.describe`; of this process."""
        return self._first.describe() + self._tail.describe()


class OwnPlan(WrappedPlan):
    """Implements `Plan`: a plan that the first process runs alone, with its part of the store."""

    def run(self, batch: StepBatch, store: KvStore | None) -> StepOutput:
        """See `Plan.run`."""
        assert isinstance(store, FirstStore)
        return self._plan.run(replace(batch, block_table=_own_tables(batch, store)), store.own)

    def decode(self, batch: StepBatch, store: KvStore, call: DecodeCall) -> Decoded:
        """See `Plan.decode`."""
        assert isinstance(store, FirstStore)
        return self._plan.decode(replace(batch, block_table=_own_tables(batch, store)), store.own, call)

    def decode_drafted(
        self, batch: StepBatch, drafter: Plan, pending: StepBatch, store: KvStore, call: DraftedCall
    ) -> DraftedRounds:
        """See `Plan.decode_drafted`."""
        return drafted_round(self, batch, drafter, pending, store, call)


def _own_tables(batch: StepBatch, store: FirstStore) -> Int32:
    """The blocks of the groups of layers that the first process has."""
    return layer_batch(batch, store.stages[0].groups, None).block_table
