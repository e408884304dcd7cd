"""Low-rank adapters as plain tensors, one pair per site."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...graph.ir import Graph

Pair = tuple[torch.Tensor, torch.Tensor]  # A [r, K], B [N, r]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ReferenceAdapters:
    """Implements `AdapterStore`. Arguments as those of `Backend.new_adapters`."""

    def __init__(self, graph: Graph, slots: int, rank: int, dtype: str, device: torch.device) -> None:
        self.slots, self._sites, self._rank = slots, graph.adapter_sites, rank
        self._dtype, self._device = _DTYPES[dtype], device
        self._pairs: list[dict[int, Pair]] = [{} for _ in range(slots)]

    def adapter_bytes(self, ranks: Mapping[int, int]) -> int:
        elements = (r * (self._sites[site].inputs + self._sites[site].outputs) for site, r in ranks.items())
        return sum(elements) * self._dtype.itemsize

    def load(self, slot: int, pairs: Mapping[int, Pair]) -> None:
        for site, (down, up) in pairs.items():
            check_pair(self._sites[site].inputs, self._sites[site].outputs, self._rank, down, up)
        self._pairs[slot] = {
            site: (down.to(self._device, self._dtype), up.to(self._device, self._dtype)) for site, (down, up) in pairs.items()
        }

    def clear(self, slot: int) -> None:
        self._pairs[slot] = {}

    def pair(self, slot: int, site: int) -> Pair | None:
        """The matrices of an adapter for a site; None: it has none."""
        return self._pairs[slot].get(site)


def check_pair(inputs: int, outputs: int, rank: int, down: torch.Tensor, up: torch.Tensor) -> None:
    """Raises ValueError if the matrices do not fit a site with this number of inputs and outputs."""
    r = len(down)
    if not 1 <= r <= rank or down.shape != (r, inputs) or up.shape != (outputs, r):
        raise ValueError(
            f"an adapter's matrices are {list(down.shape)} and {list(up.shape)}, must be [r, {inputs}] and [{outputs}, r], "
            f"r from 1 to {rank}"
        )
