"""The check that a model's weights fit in memory, before any are read."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ...errors import NotEnoughMemoryError
from ...system.memory import free_memory


def check_memory(tensors: Iterable[torch.Tensor]) -> None:
    """Raises NotEnoughMemoryError if these tensors, which have no data yet, do not fit in free memory."""
    needed, memory = sum(tensor.nbytes for tensor in tensors), free_memory()
    if needed > memory.free:
        remedy = "choose a smaller precision, or free memory; `dso doctor MODEL` shows what fits"
        raise NotEnoughMemoryError("the model's weights", needed, memory.free, remedy, memory)
