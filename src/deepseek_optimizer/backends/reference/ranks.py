"""The graphs of all ranks of a divided model, run in one process: node by node, or stage by stage.

This is the definition of `all_reduce` and `all_gather`, and of what the processes of a pipeline do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from ...graph.ops.collective import COLLECTIVES
from ..base import KvStore, Plan, StepBatch, StepOutput
from ..stage_batch import layer_batch, tail_batch
from .plan import ReferencePlan


def all_reduce(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the ranks' tensors, in ascending order of ranks."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def all_gather(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The ranks' tensors joined in their last dimension."""
    return torch.cat(list(parts), -1)


FUNCTIONS: Mapping[str, Callable[[Sequence[torch.Tensor]], torch.Tensor]] = MappingProxyType(
    {"all_reduce": all_reduce, "all_gather": all_gather}
)


class RankPlans:
    """The plans of all ranks, which take turns.

    Args:
        plans: one per rank, of graphs from `graph.parallel`.
    """

    def __init__(self, plans: Sequence[ReferencePlan]) -> None:
        self.plans = plans

    @torch.no_grad()
    def run(self, batch: StepBatch, stores: Sequence[KvStore]) -> StepOutput:
        """Runs one step, with a store for each rank; returns the result of rank 0. See `Plan.run`."""
        steps = [plan.begin(batch, store) for plan, store in zip(self.plans, stores, strict=True)]
        for i in self.plans[0].needed(batch):
            nodes = [plan.graph.nodes[i] for plan in self.plans]
            if nodes[0].op in COLLECTIVES:
                value = FUNCTIONS[nodes[0].op]([s.values[n.inputs[0]] for s, n in zip(steps, nodes, strict=True)])
                for step, node in zip(steps, nodes, strict=True):
                    step.values[node.outputs[0]] = value
            else:
                for plan, step, node in zip(self.plans, steps, nodes, strict=True):
                    plan.compute(step, node)
        return self.plans[0].result(steps[0])


class StagePlans:
    """The plans of all processes of a pipeline, which run one after the other.

    Args:
        plans: of each process's layers, from `graph.parallel.pipeline`.
        tail: of what follows the last layer.
        groups: for each of `plans`, the groups of layers of the whole cache that it has.
    """

    def __init__(self, plans: Sequence[Plan], tail: Plan, groups: Sequence[tuple[int, ...]]) -> None:
        self.plans, self.tail, self.groups = plans, tail, groups

    def run(self, batch: StepBatch, stores: Sequence[KvStore]) -> StepOutput:
        """Runs one step, with a store for each process. See `Plan.run`."""
        rows = None
        for plan, store, groups in zip(self.plans, stores, self.groups, strict=True):
            rows = plan.run(layer_batch(batch, groups, rows), store).last_hidden
        return self.tail.run(tail_batch(batch, rows), None)
