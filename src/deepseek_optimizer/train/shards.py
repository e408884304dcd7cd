"""Sharded parameters (FSDP2's DTensor): each process updates its own shard; norms are computed over all shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

try:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Replicate
except ImportError:  # torch built without distributed: nothing is sharded
    DTensor = FSDPModule = None  # type: ignore[assignment,misc]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a sharded tensor; any other tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is divided among processes."""
    return DTensor is not None and isinstance(tensor, DTensor)


def gathers(module: torch.nn.Module) -> bool:
    """Whether FSDP2 shards a module's weights, and gathers them only around its calls."""
    return FSDPModule is not None and isinstance(module, FSDPModule)


def total_squares(tensors: Sequence[torch.Tensor], sums: list[float], counts: list[int]) -> tuple[list[float], list[int]]:
    """Reduces sums and counts over the shards of each tensor. All processes get the same result.

    Args:
        tensors: the tensors, sharded or not, in the same order in every process.
        sums, counts: one value per tensor, for this process's shard.
    """
    sums, counts = list(sums), list(counts)
    for group, places in _groups(tensors):
        pair = torch.tensor([[sums[i] for i in places], [float(counts[i]) for i in places]], dtype=torch.float64, device="cpu")
        pair = pair.to(local(tensors[places[0]]).device)
        dist.all_reduce(pair, group=group)
        for i, total, count in zip(places, *pair.tolist(), strict=True):
            sums[i], counts[i] = total, int(count)
    return sums, counts


def _groups(tensors: Sequence[torch.Tensor]) -> list[tuple[dist.ProcessGroup, list[int]]]:
    """Each group of processes that share tensors between them, with the indices of those tensors."""
    groups: dict[str, tuple[dist.ProcessGroup, list[int]]] = {}
    for i, tensor in enumerate(tensors):
        if DTensor is None or not isinstance(tensor, DTensor):
            continue
        for dim, placement in enumerate(tensor.placements):
            if not isinstance(placement, Replicate):
                group = tensor.device_mesh.get_group(dim)
                groups.setdefault(group.group_name, (group, []))[1].append(i)
    return list(groups.values())
