"""The shards of a small model, for tests of the division among processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.backends.reference.ranks import RankPlans
from deepseek_optimizer.graph.ir import Graph
from deepseek_optimizer.graph.parallel.shard import Shard, Units
from deepseek_optimizer.graph.parallel.tensor import split
from deepseek_optimizer.quant.parts import part_of
from support.steps import Runner


def any_part(name: str) -> Units:
    """Of dense matrices, which can be divided anywhere."""
    return Units(1, 1)


def shard_weights(shard: Shard, weights: Mapping[str, Any]) -> dict[str, Any]:
    """What a rank has of the model's weights, by name in its graph."""
    own = {name: part_of(weights[name], p.rows, p.cols) for name, p in shard.parts.items()}
    own |= {name: part_of(weights[source], rows) for name, (source, rows) in shard.views.items()}
    return {name: own[name] if name in own else weights[name] for name in shard.graph.weights()}


@dataclass
class RankRunner:
    """As `support.steps.Runner`, over all ranks; `plan` and `store` are those of a `Runner`."""

    plans: RankPlans
    stores: list[Any]

    def run(self, batch: Any, store: Any) -> Any:
        return self.plans.run(batch, self.stores)


class _Stores:
    """The stores of all ranks, as far as tests use one."""

    num_states = 0

    def __init__(self, stores: list[Any]) -> None:
        self.num_blocks, self._stores = stores[0].num_blocks, stores

    def copy_block(self, source: int, target: int) -> None:
        for store in self._stores:
            store.copy_block(source, target)


def rank_runner(graph: Graph, weights: Mapping[str, torch.Tensor], ranks: int, kv: str = "fp32") -> Runner:
    """A runner of the reference backend over all ranks."""
    backend = ReferenceBackend()
    shards = [split(graph, rank, ranks, any_part) for rank in range(ranks)]
    plans = RankPlans([backend.compile(s.graph, shard_weights(s, weights)) for s in shards])
    stores = [backend.new_store(s.graph, kv, 128) for s in shards]
    return Runner(RankRunner(plans, stores), _Stores(stores), (None,) * graph.cache.groups)
