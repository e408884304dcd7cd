"""The shards of a small model, for tests of the division among processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.backends.reference.ranks import RankPlans, StagePlans
from deepseek_optimizer.graph.ir import Graph
from deepseek_optimizer.graph.parallel import Parallel
from deepseek_optimizer.graph.parallel.pipeline import split_layers
from deepseek_optimizer.graph.parallel.shard import Part, Shard, Units
from deepseek_optimizer.graph.parallel.tensor import split
from deepseek_optimizer.quant.parts import part_of
from support.steps import Runner


def any_part(name: str) -> Units:
    """Of dense matrices, which can be divided anywhere."""
    return Units(1, 1)


def shard_weights(shard: Shard, weights: Mapping[str, Any]) -> dict[str, Any]:
    """What a rank has of the model's weights, by name in its graph."""
    own = {name: _part_of(weights[name], p) for name, p in shard.parts.items()}
    own |= {name: part_of(weights[source], rows) for name, (source, rows) in shard.views.items()}
    return {name: own[name] if name in own else weights[name] for name in shard.graph.weights()}


def _part_of(weight: torch.Tensor, part: Part) -> Any:
    """The part of a matrix or vector, or of a merged parameter of experts [E, M * rows, cols]."""
    if weight.ndim < 3:
        return part_of(weight, part.rows, part.cols)
    begin, end = part.experts or (0, len(weight))
    if part.rows is None and part.cols is None:
        return weight[begin:end]
    rows = weight.shape[1] if part.rows is None else weight.shape[1] // 2  # gate and up
    matrices = weight[begin:end].unflatten(1, (-1, rows))
    matrices = matrices[..., slice(*(part.rows or (0, rows))), :]
    return matrices[..., slice(*(part.cols or (0, weight.shape[2])))].flatten(1, 2)


@dataclass
class RankRunner:
    """As `support.steps.Runner`, over all ranks; `plan` and `store` are those of a `Runner`."""

    plans: RankPlans | StagePlans
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


def rank_runner(graph: Graph, weights: Mapping[str, torch.Tensor], parallel: Parallel | int, kv: str = "fp32") -> Runner:
    """A runner of the reference backend over all ranks; `parallel`: a number is that of `tensor`."""
    backend = ReferenceBackend()
    parallel = parallel if isinstance(parallel, Parallel) else Parallel(parallel)
    shards = [split(graph, rank, parallel, any_part) for rank in range(parallel.ranks)]
    plans = RankPlans([backend.compile(s.graph, shard_weights(s, weights)) for s in shards])
    stores = [backend.new_store(s.graph, kv, 128) for s in shards]
    return Runner(RankRunner(plans, stores), _Stores(stores), (None,) * graph.cache.groups)


def stage_runner(graph: Graph, weights: Mapping[str, torch.Tensor], ranks: int, kv: str = "fp32") -> Runner:
    """A runner of the reference backend over all processes of a pipeline."""
    backend = ReferenceBackend()
    stages = split_layers(graph, ranks, lambda name: weights[name].numel())

    def compiled(part: Graph) -> Any:
        return backend.compile(part, {name: weights[name] for name in part.weights()})

    assert stages[0].tail is not None
    plans = StagePlans([compiled(s.graph) for s in stages], compiled(stages[0].tail), [s.groups for s in stages])
    stores = [backend.new_store(s.graph, kv, 128) for s in stages]
    return Runner(RankRunner(plans, stores), _Stores(stores), (None,) * graph.cache.groups)
