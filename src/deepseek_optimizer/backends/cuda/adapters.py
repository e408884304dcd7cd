"""Low-rank adapters on the device. Kernels find an adapter's matrices by a table of addresses, so an adapter takes the memory
of its own ranks, and one that is loaded or cleared does not end captured steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...errors import BackendError
from ...graph.ir import Graph
from ..reference.adapters import Pair, check_pair, elements_of
from .memory import memory_errors

ENTRY = 3  # of the table: address of A, address of B, rank
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_REMEDY = "unload another adapter, reduce the rank, or set a smaller kv_cache_memory"


class CudaAdapters:
    """Implements `AdapterStore`. Arguments as those of `Backend.new_adapters`.

    Attributes:
        table: int64 [slots, sites, ENTRY], on the device; ranks are 0 where an adapter has no matrices.
        dtype: of the matrices.
    """

    def __init__(self, graph: Graph, slots: int, rank: int, dtype: str, device: torch.device) -> None:
        self.slots, self._sites, self._rank, self.dtype = slots, graph.adapter_sites, rank, _DTYPES[dtype]
        self._held: list[list[torch.Tensor]] = [[] for _ in range(slots)]
        with torch.inference_mode(False):  # adapters may be loaded outside of inference mode
            self.table = torch.zeros((slots, len(self._sites), ENTRY), dtype=torch.int64, device=device)

    def adapter_bytes(self, ranks: Mapping[int, int]) -> int:
        return sum(elements_of(self._sites[site], r) for site, r in ranks.items()) * self.dtype.itemsize

    def load(self, slot: int, pairs: Mapping[int, Pair]) -> None:
        """See `AdapterStore.load`. Raises BackendError too, if the adapter changes keys or values of latent attention."""
        for site, (down, up) in pairs.items():
            check_pair(self._sites[site], self._rank, down, up)
            if self._sites[site].latent is not None:
                raise BackendError(
                    f"the cuda backend does not have adapters of latent attention's {self._sites[site].module!r} yet; leave "
                    'this module out of the adapter, or load the model with backend="reference"'
                )
        rows, held = torch.zeros(self.table.shape[1:], dtype=torch.int64, device="cpu"), list[torch.Tensor]()
        with memory_errors(f"a LoRA adapter on {self.table.device}", _REMEDY):
            for site, pair in pairs.items():
                a, b = [matrix.detach().to(self.table.device, self.dtype).contiguous() for matrix in pair]
                held += [a, b]
                rows[site] = torch.tensor([a.data_ptr(), b.data_ptr(), len(a)], dtype=torch.int64, device="cpu")
        self._held[slot] = held
        self._set(slot, rows)

    def clear(self, slot: int) -> None:
        self._set(slot, torch.zeros(self.table.shape[1:], dtype=torch.int64, device="cpu"))
        self._held[slot] = []

    def _set(self, slot: int, rows: torch.Tensor) -> None:
        """Returns when later steps see the entries, on whatever stream they run."""
        self.table[slot].copy_(rows)
        if self.table.is_cuda:
            torch.cuda.current_stream(self.table.device).synchronize()
