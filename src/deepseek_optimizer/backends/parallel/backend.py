"""Backend `cpu` in a process that runs a part of a model: it divides the graph, and the leader also starts steps in the others.

What is above backends sees only the leader's, whose plan and store stand for those of all processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

from ...errors import BackendError, RankLostError, UnsupportedRequestError
from ...graph.ir import CacheSpec, Graph, LatentSpec
from ...graph.parallel import Parallel
from ...graph.parallel.shard import Shard, Units
from ...graph.parallel.tensor import split
from ...graph.rope_rotation import KeyRotation
from ...quant import get_format
from ...quant.packed import PackedMatrix, PackedWeight
from ...quant.parts import packed_part, part_units
from ..base import DEFAULTS, Capabilities, CompileOptions, Int32, KvStore, Plan, StepBatch, StepOutput
from ..cpu import CpuBackend, CpuPlan, CpuStore
from ..cpu.group import Group
from ..decode_one import decode_one
from ..decoding import DecodeCall, Decoded, DraftedCall, DraftedRounds
from ..drafted_round import drafted_round
from ..qualities import Quality
from ..wrapped_plan import WrappedPlan
from .leader import Leader
from .shared_plans import SharedPlans

Result = TypeVar("Result")


class RankBackend(CpuBackend):
    """Implements `Backend` for the process of one rank.

    Args:
        isa, threads: as for `CpuBackend`; threads of this process.
        group: this process's place among those that run the model.
        parallel: how the model is divided among them.
        leader: of rank 0 the other processes; None in these.
    """

    def __init__(
        self, isa: str | None, threads: int | None, group: Group, parallel: Parallel, leader: Leader | None = None
    ) -> None:
        super().__init__(isa, threads, group)
        self.group, self.parallel, self.leader = group, parallel, leader
        self.plans = SharedPlans(group.ranks, leader)

    @property
    def capabilities(self) -> Capabilities:
        able = super().capabilities
        return replace(able, training=False, adapters=False, drafted_calls=False, dense_operations=False)

    @property
    def detail(self) -> str:
        return f"{self.isa}, {self.group.ranks} processes of {self.threads} threads"

    @property
    def note(self) -> str | None:
        return None

    def compile(  # type: ignore[override]  # the leader's plan is around a CpuPlan
        self, graph: Graph, weights: Mapping[str, PackedWeight | torch.Tensor], options: CompileOptions = DEFAULTS
    ) -> Plan:
        """Binds this rank's share of `graph`.

        Args:
            graph: of the whole model.
            weights: this rank's parts, by the names of the whole weights.
            options: as in `Backend.compile`.

        Raises:
            UnsupportedRequestError: the other processes have not compiled this graph while they loaded the model.
        """
        self.plans.check(graph)
        shard = shard_of(graph, self.group.rank, self.parallel, _formats(weights))
        plan = super().compile(shard.graph, {**weights, **_views(shard, weights)}, options)
        number = self.plans.add(graph, plan)
        return plan if self.leader is None else LeaderPlan(number, plan, self.leader)

    def compile_in_all(self, quality: Quality, compile_own: Callable[[], Plan]) -> Plan:
        """Compiles a plan in all processes; in the leader.

        Args:
            quality: of the plan, an argument of the function that `serve` has.
            compile_own: compiles it here.
        """
        assert self.leader is not None
        plan: Plan = self.leader.ask(("compile", quality), lambda: self.plans.in_all(compile_own))[0]
        return plan

    def new_store(  # type: ignore[override]  # the leader's store is around a CpuStore
        self, graph: Graph, kv_dtype: str, num_blocks: int, num_states: int = 0
    ) -> KvStore:
        own = self._own(graph)
        if self.leader is None:
            return super().new_store(own, kv_dtype, num_blocks)
        number = self.leader.new_number()
        make = super().new_store
        store = self.leader.ask(("new_store", number, kv_dtype, num_blocks), lambda: make(own, kv_dtype, num_blocks))[0]
        return LeaderStore(number, store, self.leader)

    def block_bytes(self, graph: Graph, kv_dtype: str) -> int:
        """Of all processes on this machine."""
        return self.group.ranks_here * super().block_bytes(self._own(graph), kv_dtype)

    def buffer_bytes(
        self, graph: Graph, formats: Mapping[str, str], options: CompileOptions, tokens: int, logit_rows: int
    ) -> int:
        """Of all processes on this machine, without the memory that they share."""
        shard = shard_of(graph, self.group.rank, self.parallel, formats)
        own = {**formats, **{name: formats[source] for name, (source, _) in shard.views.items()}}
        return self.group.ranks_here * super().buffer_bytes(shard.graph, own, options, tokens, logit_rows)

    @property
    def division(self) -> str:
        """How the model is divided, equal only where each rank has the same part."""
        return str(self.parallel)

    def fingerprints(self, whole: bool, own: Callable[[], str]) -> list[str]:
        """Of what each process has, by rank; in the leader.

        Args:
            whole: an argument of the function that `serve` has.
            own: this process's.
        """
        assert self.leader is not None
        return self.leader.ask(("fingerprint", whole), own)

    def _own(self, graph: Graph) -> Graph:
        """The graph with this rank's cache."""
        cache, ranks = graph.cache, self.group.ranks
        if isinstance(cache, LatentSpec):
            return graph  # latents are whole in each process
        assert isinstance(cache, CacheSpec)
        heads = cache.kv_heads
        kv_heads = tuple(n // ranks for n in heads) if isinstance(heads, tuple) else heads // ranks
        return replace(graph, cache=replace(cache, kv_heads=kv_heads))

    def linear(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: modules have parts of matrices."""
        raise UnsupportedRequestError(
            f"the model runs in {self.group.ranks} processes, each with a part of its weights, so only its plan can run, not "
            "Transformers' own forward (attention weights, hooks, gradients, adapters); load it without parallel"
        )

    linear_gradient = linear


def shard_of(graph: Graph, rank: int, parallel: Parallel, formats: Mapping[str, str]) -> Shard:
    """The share of a rank of a graph whose matrices have these formats, by name.

    Raises:
        UnsupportedModelError, ConfigError: see `graph.parallel.tensor.split`.
    """
    return split(graph, rank, parallel, lambda name: Units(*part_units(formats[name])))


def _formats(weights: Mapping[str, PackedWeight | torch.Tensor]) -> dict[str, str]:
    """By name; matrices that are not packed are divided like fp32."""
    fp32 = get_format("fp32").name
    return {name: weight.format if isinstance(weight, PackedWeight) else fp32 for name, weight in weights.items()}


def _views(shard: Shard, weights: Mapping[str, PackedWeight | torch.Tensor]) -> dict[str, PackedMatrix]:
    """Rows of matrices that the rank has as a whole, by their names in its graph."""
    views = {}
    for name, (source, rows) in shard.views.items():
        matrix = weights[source]
        if not isinstance(matrix, PackedMatrix):
            raise BackendError(f"weight {source!r} must be packed for the cpu backend, got a {type(matrix).__name__}")
        views[name] = packed_part(matrix, rows)
    return views


class LeaderStore:
    """Implements `KvStore`: the stores of all ranks, each with some heads of the same blocks, or with the same latents.

    Args:
        number: that all processes know it by.
        own: this process's.
        leader: the other processes.
    """

    num_states = state_bytes = 0

    def __init__(self, number: int, own: CpuStore, leader: Leader) -> None:
        self.number, self.own, self.leader = number, own, leader
        self.num_blocks = own.num_blocks
        self.block_bytes = leader.group.ranks_here * own.block_bytes

    def __del__(self) -> None:
        if "leader" in self.__dict__:
            self.leader.drop(self.number)

    @property
    def held_blocks(self) -> int:
        return self.own.held_blocks

    @property
    def held_states(self) -> int:
        return self.own.held_states

    @property
    def saved_bytes(self) -> int:
        return self.leader.group.ranks * self.own.saved_bytes

    def copy_block(self, source: int, target: int) -> None:
        self._all("copy_block", source, target)

    def release(self, from_block: int) -> None:
        """See `KvStore.release`. It may be the last that happens to a model: processes that have ended hold no memory."""
        try:
            self._all("release", from_block)
        except RankLostError:
            self.own.release(from_block)

    def read_block(self, block: int) -> bytes:
        """The contents of all ranks, by rank."""
        return b"".join(self._ask("read_block", block))

    def write_block(self, block: int, data: bytes) -> None:
        if len(data) != self.saved_bytes:
            raise ValueError(f"a block has {self.saved_bytes} bytes, got {len(data)}")
        size = self.own.saved_bytes
        parts = [data[i : i + size] for i in range(0, len(data), size)]
        self.leader.together(("write_block", self.number, block, parts), lambda: self.own.write_block(block, parts[0]))

    def rotate(self, rotation: KeyRotation, block_table: Int32, tokens: int, position: int, delta: int, group: int = 0) -> None:
        rotation.check(position + tokens)
        self._all("rotate", rotation, block_table, tokens, position, delta, group)

    def read(self, layer: int, block_table: Int32, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(self.own.spec, LatentSpec):
            return self.own.read(layer, block_table, tokens)
        keys, values = zip(*self._ask("read", layer, block_table, tokens), strict=True)
        return torch.cat(keys), torch.cat(values)

    def copy_state(self, source: int, target: int) -> None:
        """There are no states."""

    def release_states(self, from_slot: int) -> None:
        """There are no states."""

    def read_state(self, slot: int) -> bytes:
        """There are no states."""
        return b""

    def write_state(self, slot: int, data: bytes) -> None:
        """There are no states."""

    def _all(self, method: str, *arguments: Any) -> None:
        self.leader.together(("store", self.number, method, arguments), lambda: getattr(self.own, method)(*arguments))

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        message = ("ask_store", self.number, method, arguments)
        return self.leader.ask(message, lambda: getattr(self.own, method)(*arguments))


class LeaderPlan(WrappedPlan):
    """Implements `Plan`: the plans of all ranks.

    Args:
        number: that all processes know it by.
        plan: this process's.
        leader: the other processes, which have compiled theirs from the same graph.
    """

    def __init__(self, number: int, plan: CpuPlan, leader: Leader) -> None:
        super().__init__(plan)
        self._number, self._own, self._leader = number, plan, leader
        self._seconds: dict[int, float] = {}  # of a decode step, by number of sequences

    def run(self, batch: StepBatch, store: KvStore | None) -> StepOutput:
        """See `Plan.run`."""
        assert isinstance(store, LeaderStore)
        run = self._own.checked(batch, store.own)
        return self._together(("run", self._number, store.number, _sent(batch)), run)

    def decode(self, batch: StepBatch, store: KvStore, call: DecodeCall) -> Decoded:
        """See `Plan.decode`. All ranks choose the tokens from the same logits, so they agree on them and on the last step.

        Only this one looks at the clock: it decides beforehand how many steps fit into the call's time.
        """
        assert isinstance(store, LeaderStore)
        rows = len(call.rows)
        if any(row.noise is not None for row in call.rows):
            return decode_one(self, batch, store, call)
        known = self._seconds.get(rows)
        steps = 1 if known is None else max(1, int(min(call.steps, call.seconds / known)))
        timeless = replace(call, steps=steps, seconds=np.inf)
        self._own.checked(replace(batch, logits=None), store.own)
        start = time.perf_counter()
        decoded = self._together(
            ("decode", self._number, store.number, replace(_sent(batch), draft_states=batch.draft_states), timeless),
            lambda: self._own.decode(batch, store.own, timeless),
        )
        self._seconds[rows] = (time.perf_counter() - start) / max(1, decoded.steps)
        return decoded

    def decode_drafted(
        self, batch: StepBatch, drafter: Plan, pending: StepBatch, store: KvStore, call: DraftedCall
    ) -> DraftedRounds:
        """See `Plan.decode_drafted`."""
        return drafted_round(self, batch, drafter, pending, store, call)

    def check_weights(self) -> None:
        """See `Plan.check_weights`; also raises RankLostError. The other processes check their weights when they run."""
        self._own.check_weights()
        self._leader.check()

    def _together(self, message: tuple[Any, ...], function: Callable[[], Result]) -> Result:
        """See `Leader.together`. A changed file ends all processes, in whichever of them it was found first."""
        try:
            return self._leader.together(message, function)
        except RankLostError:
            self._own.check_weights()
            raise


def _sent(batch: StepBatch) -> StepBatch:
    """What the other ranks need of a batch: they return nothing."""
    return replace(batch, logits=None, hidden=False, last_hidden=False, draft_states=False, adapters=None, adapter_of=None)
