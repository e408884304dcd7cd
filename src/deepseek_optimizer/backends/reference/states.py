"""Slots for recurrent states as torch tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...errors import BackendError
from ...graph.ir import StateSpec


def state_bytes(specs: Sequence[StateSpec]) -> int:
    """Bytes of one slot."""
    return sum(spec.elements for spec in specs) * torch.float32.itemsize


class StateSlots:
    """Slots that hold one float32 tensor per state. Memory is allocated when a slot is first written.

    Args:
        specs: the states of a graph.
        slots: number of slots.
        device: where the tensors are.
    """

    def __init__(self, specs: Sequence[StateSpec], slots: int, device: torch.device) -> None:
        self.specs, self.slots, self.device = tuple(specs), slots, device
        self._data: dict[int, list[torch.Tensor]] = {}  # by slot

    def read(self, index: int, slot: int) -> torch.Tensor:
        """State `index` of a slot, float32; zeros for slot -1."""
        if slot < 0:
            return torch.zeros(self.specs[index].shape, dtype=torch.float32, device=self.device)
        return self._of(slot)[index].clone()

    def write(self, index: int, slot: int, state: torch.Tensor) -> None:
        """Stores state `index` in a slot."""
        self._of(slot)[index].copy_(state)

    def copy(self, source: int, target: int) -> None:
        for old, new in zip(self._of(source), self._of(target), strict=True):
            new.copy_(old)

    def release(self, from_slot: int) -> None:
        self._data = {slot: data for slot, data in self._data.items() if slot < from_slot}

    def read_bytes(self, slot: int) -> bytes:
        return b"".join(state.cpu().numpy().tobytes() for state in self._of(slot))

    def write_bytes(self, slot: int, data: bytes) -> None:
        size = state_bytes(self.specs)
        if len(data) != size:
            raise ValueError(f"a slot has {size} bytes, got {len(data)}")
        values = torch.frombuffer(bytearray(data), dtype=torch.float32).split([spec.elements for spec in self.specs])
        for state, new in zip(self._of(slot), values, strict=True):
            state.copy_(new.view(state.shape))

    def _of(self, slot: int) -> list[torch.Tensor]:
        if not 0 <= slot < self.slots:
            raise BackendError(f"state slot {slot} is outside the cache's {self.slots} slots")
        if slot not in self._data:
            self._data[slot] = [torch.zeros(s.shape, dtype=torch.float32, device=self.device) for s in self.specs]
        return self._data[slot]
