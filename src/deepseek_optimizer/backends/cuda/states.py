"""Slots for recurrent states on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...errors import BackendError
from ...graph.ir import StateSpec
from ..reference.states import StateSlots, state_bytes
from .memory import memory_errors


class DeviceStates(StateSlots):
    """Slots as rows of one tensor, float32 [slots, elements]: the states of a graph one after the other, as the reference's
    slots have them. All memory is allocated at the first use, so that captured steps find it at one address.

    Attributes:
        data: the slots; none before the first use.
        offsets: where each state begins in a slot, in elements.
    """

    def __init__(self, specs: Sequence[StateSpec], slots: int, device: torch.device) -> None:
        super().__init__(specs, slots, device)
        sizes = [spec.elements for spec in self.specs]
        self.offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        self.data = torch.zeros((0, sum(sizes)), dtype=torch.float32, device=device)

    def ensure(self) -> None:
        """Allocates memory, before a step that uses any slot."""
        if len(self.data) < self.slots:
            size = self.slots * state_bytes(self.specs)
            with memory_errors(f"recurrent states of {size / 1e9:.2f} GB on {self.device}", "set a smaller kv_cache_memory"):
                with torch.inference_mode(False):  # later steps may write to it outside of inference mode
                    self.data = self.data.new_zeros((self.slots, self.data.shape[1]))

    def release(self, from_slot: int) -> None:
        """Frees the memory if no slot is left; otherwise all of it stays, at its address."""
        if from_slot == 0:
            self.data = self.data.new_zeros((0, self.data.shape[1]))

    def _of(self, slot: int) -> list[torch.Tensor]:
        if not 0 <= slot < self.slots:
            raise BackendError(f"state slot {slot} is outside the cache's {self.slots} slots")
        self.ensure()
        parts = self.data[slot].split([spec.elements for spec in self.specs])
        return [part.view(spec.shape) for part, spec in zip(parts, self.specs, strict=True)]
