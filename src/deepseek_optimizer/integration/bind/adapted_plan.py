"""The plan of a model with PEFT's LoRA layers: it adds what their active adapters add, to every sequence of a step.

The matrices are read from the layers, so that all of PEFT's ways to load, choose and train adapters work as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...backends.base import AdapterStore, Backend, KvStore, Plan, StepBatch, StepOutput
from ...backends.decoding import DecodeCall, Decoded, DraftedCall, DraftedRounds
from ...backends.wrapped_plan import WrappedPlan
from ...graph.ir import Graph
from .lora_layers import LowRank, pair_of_site, sum_of

_RANK_STEP = 16  # ranks that a plan has room for are multiples of it
Parts = Mapping[str, list[LowRank]]  # what is added, by path of the module


class AdaptedPlan(WrappedPlan):
    """A `Plan` whose steps use one adapter for all sequences. Everything else is that of the plan inside it."""

    def __init__(self, plan: Plan, adapters: AdapterStore) -> None:
        super().__init__(plan)
        self._adapters = adapters

    def run(self, batch: StepBatch, store: KvStore | None) -> StepOutput:
        """See `Plan.run`."""
        return super().run(self._with_adapter(batch), store)

    def decode(self, batch: StepBatch, store: KvStore, call: DecodeCall) -> Decoded:
        """See `Plan.decode`."""
        return super().decode(self._with_adapter(batch), store, call)

    def decode_drafted(
        self, batch: StepBatch, drafter: Plan, pending: StepBatch, store: KvStore, call: DraftedCall
    ) -> DraftedRounds:
        """See `Plan.decode_drafted`."""
        return super().decode_drafted(self._with_adapter(batch), drafter, pending, store, call)

    def _with_adapter(self, batch: StepBatch) -> StepBatch:
        return replace(batch, adapters=self._adapters, adapter_of=np.zeros(len(batch.query_len), np.int32))


class LayerAdapters:
    """The adapted plan of a model, compiled when the largest rank grows, and its adapter, read again when a layer has changed.

    Args:
        backend: runs the plan.
        graph_of: returns the model's graph with adapters of this rank at most.
        compile: compiles it.
    """

    def __init__(self, backend: Backend, graph_of: Callable[[int], Graph], compile: Callable[[Graph], Plan]) -> None:
        self._backend, self._graph_of, self._compile_graph = backend, graph_of, compile
        self._rank = 0
        self._state: Any = None
        self._sites = {site.module for site in graph_of(_RANK_STEP).adapter_sites}

    def covers(self, path: str) -> bool:
        """Whether the plan can add to the product of the module at this path."""
        return path in self._sites

    def plan(self, parts: Parts) -> Any:
        """The plan that adds `parts`, of which there is at least one."""
        rank = max(sum(part.down.shape[0] for part in added) for added in parts.values())
        if rank > self._rank:
            self._compile(-(-rank // _RANK_STEP) * _RANK_STEP)
        state = [(path, [part.state for part in added]) for path, added in parts.items()]
        if not _equal(state, self._state):
            self._load(parts)
            self._state = state
        return self._adapted

    def _compile(self, rank: int) -> None:
        self._rank, self._state = rank, None
        self._graph = self._graph_of(rank)
        self._store = self._backend.new_adapters(self._graph, 1, rank, "fp32")
        self._adapted = AdaptedPlan(self._compile_graph(self._graph), self._store)

    def _load(self, parts: Parts) -> None:
        sums = {path: sum_of(added) for path, added in parts.items()}
        pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {
            index: pair_of_site(site, *sums[site.module])
            for index, site in enumerate(self._graph.adapter_sites)
            if site.module in sums
        }
        self._store.clear(0)
        self._store.load(0, pairs)


def _equal(a: Any, b: Any) -> bool:
    """Whether two states have the same structure and numbers, and the same tensors, not only equal ones."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a is b or (not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and bool(a == b))
