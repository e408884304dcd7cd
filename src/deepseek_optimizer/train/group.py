"""Values of all processes that train together. With one process, every function returns what it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")


def size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, on the tensor's device. Must be called by all of them, with equal shapes and dtypes."""
    if size() == 1:
        return tensor
    total = tensor.to(_device(), copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def total(*numbers: float) -> list[float]:
    """The sums over all processes of some numbers, in fp64. Must be called by all of them, with equally many numbers."""
    sums: list[float] = summed(torch.tensor(numbers, dtype=torch.float64, device="cpu")).tolist()
    return sums


def joined(values: torch.Tensor) -> torch.Tensor:
    """The values [n] of all processes, in order of their ranks; n may differ. Must be called by all of them."""
    if size() == 1:
        return values
    lengths = [torch.zeros(1, dtype=torch.int64, device=_device()) for _ in range(size())]
    dist.all_gather(lengths, torch.tensor([len(values)], dtype=torch.int64, device=_device()))
    longest = max(int(length) for length in lengths)
    own = torch.nn.functional.pad(values.to(_device()), (0, longest - len(values)))
    parts = [torch.empty_like(own) for _ in lengths]
    dist.all_gather(parts, own)
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)]).to(values.device)


def of_first(value: Callable[[], T]) -> T:
    """What a function returns in the first process, where alone it is called. Must be called by all of them; what the function
    raises ends the first only."""
    if size() == 1:
        return value()
    given = [value() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(given, src=0, device=_device())
    return cast(T, given[0])


def _device() -> torch.device:
    """Where the group's backend needs tensors to be."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
