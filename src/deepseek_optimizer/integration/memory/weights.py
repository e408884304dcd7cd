"""The check that a model's weights fit in memory, before any are read."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ...errors import NotEnoughMemoryError
from ...system.memory import device_memory, mb

_CPU = torch.device("cpu")


def check_memory(tensors: Iterable[torch.Tensor], device: torch.device = _CPU, cache: int | None = None) -> None:
    """Raises NotEnoughMemoryError if a model does not fit in free memory.

    Args:
        tensors: its weights, which have no data yet or are elsewhere.
        device: where they are loaded to.
        cache: bytes that the settings grant the KV cache on a device (`kv_cache_memory`), which has no memory besides.
    """
    needed, memory = sum(tensor.nbytes for tensor in tensors), device_memory(device)
    what, remedy = "the model's weights", "choose a smaller precision, or free memory; `dso doctor MODEL` shows what fits"
    if device.type != "cpu":
        remedy = "choose a smaller precision, free the device's memory, or load the model on the CPU"
        if cache is not None:
            needed, what = needed + cache, f"{what} and a KV cache of {mb(cache)}"
            remedy = f"set a smaller kv_cache_memory, {remedy}"
    if needed > memory.free:
        raise NotEnoughMemoryError(what, needed, memory.free, remedy, memory)
