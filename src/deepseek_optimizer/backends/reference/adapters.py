"""Low-rank adapters as plain tensors, one pair per site."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ...graph.ir import AdapterSite, Graph, Node
from ..base import StepBatch

Pair = tuple[torch.Tensor, torch.Tensor]  # A [r, K], B [N, r]; of latent attention, one of them with heads as first axis
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ReferenceAdapters:
    """Implements `AdapterStore`. Arguments as those of `Backend.new_adapters`."""

    def __init__(self, graph: Graph, slots: int, rank: int, dtype: str, device: torch.device) -> None:
        self.slots, self._sites, self._rank = slots, graph.adapter_sites, rank
        self._dtype, self._device = _DTYPES[dtype], device
        self._pairs: list[dict[int, Pair]] = [{} for _ in range(slots)]

    def adapter_bytes(self, ranks: Mapping[int, int]) -> int:
        return sum(elements_of(self._sites[site], r) for site, r in ranks.items()) * self._dtype.itemsize

    def load(self, slot: int, pairs: Mapping[int, Pair]) -> None:
        for site, (down, up) in pairs.items():
            check_pair(self._sites[site], self._rank, down, up)
        self._pairs[slot] = {
            site: (down.to(self._device, self._dtype), up.to(self._device, self._dtype)) for site, (down, up) in pairs.items()
        }

    def clear(self, slot: int) -> None:
        self._pairs[slot] = {}

    def pair(self, slot: int, site: int) -> Pair | None:
        """The matrices of an adapter for a site; None: it has none."""
        return self._pairs[slot].get(site)


def elements_of(site: AdapterSite, rank: int) -> int:
    """Number of elements of a site's pair."""
    down, up = site.pair_shapes(rank)
    return math.prod(down) + math.prod(up)


def check_pair(site: AdapterSite, rank: int, down: torch.Tensor, up: torch.Tensor) -> None:
    """Raises ValueError if the matrices do not fit the site."""
    r = down.shape[-2]
    if not 1 <= r <= rank or (down.shape, up.shape) != site.pair_shapes(r):
        raise ValueError(
            f"an adapter's matrices are {list(down.shape)} and {list(up.shape)}, must be of shapes {site.pair_shapes(r)} with "
            f"rank 1 to {rank}"
        )


def kv_b_of_sequences(kv_b: torch.Tensor, batch: StepBatch, node: Node) -> list[torch.Tensor]:
    """kv_b with the adapter of each sequence, float32 [heads, nope + v_dim, rank].

    Args:
        kv_b: the model's own, [heads * (nope + v_dim), rank].
        node: of latent attention.
    """
    kv_b = kv_b.float().unflatten(0, (node.attrs["heads"], -1))
    site, slots, nope = node.attrs.get("site", -1), batch.adapter_of, node.attrs["nope"]
    if site < 0 or slots is None:
        return [kv_b] * len(batch.query_len)
    store: Any = batch.adapters
    adapted: list[torch.Tensor] = []
    for slot in slots.tolist():
        keys: Pair | None = None if slot < 0 else store.pair(slot, site)
        values: Pair | None = None if slot < 0 else store.pair(slot, site + 1)
        if keys is None or values is None:
            adapted.append(kv_b)
        else:  # of keys: A [heads, r, nope], B [rank, r]
            adapted.append(kv_b.clone())
            adapted[-1][:, :nope] += (keys[1].float() @ keys[0].float()).transpose(1, 2)
            adapted[-1][:, nope:] += values[1].float() @ values[0].float()  # A [r, rank], B [heads, v_dim, r]
    return adapted
