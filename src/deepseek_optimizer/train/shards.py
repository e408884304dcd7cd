"""Parameters that several processes share (FSDP2's DTensor): each process works on its own shard, norms are of the whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

try:
    from torch.distributed.tensor import DTensor, Replicate
except ImportError:  # a torch without distributed: nothing is shared
    DTensor = None  # type: ignore[assignment,misc]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a shared tensor; any other tensor itself."""
    return tensor.to_local() if DTensor is not None and isinstance(tensor, DTensor) else tensor


def total_squares(tensors: Sequence[torch.Tensor], sums: list[float], counts: list[int]) -> tuple[list[float], list[int]]:
    """Sums and counts of whole tensors, of those of this process's shards: equal in all processes.

    Args:
        tensors: what they are of, shared or not; the same ones in the same order in every process.
        sums, counts: one each a tensor.
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
    """Each group of processes that hold different parts of tensors, with the places of those tensors."""
    found: dict[str, tuple[dist.ProcessGroup, list[int]]] = {}
    for i, tensor in enumerate(tensors):
        if DTensor is None or not isinstance(tensor, DTensor):
            continue
        for dim, placement in enumerate(tensor.placements):
            if not isinstance(placement, Replicate):
                group = tensor.device_mesh.get_group(dim)
                found.setdefault(group.group_name, (group, []))[1].append(i)
    return list(found.values())
