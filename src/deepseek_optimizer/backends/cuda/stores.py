"""The store for each kind of cache."""

from __future__ import annotations

from ...graph.ir import CacheSpec, LatentSpec, RowsSpec
from .latent_store import CudaLatentStore, latent_offsets
from .rows_store import CudaRowsStore, row_offsets
from .store import CudaStore, layer_offsets


def store_class(spec: CacheSpec | LatentSpec | RowsSpec) -> type[CudaStore] | type[CudaLatentStore] | type[CudaRowsStore]:
    """The class of stores of a cache that `supported.check_cache` lets pass."""
    if isinstance(spec, RowsSpec):
        return CudaRowsStore
    return CudaLatentStore if isinstance(spec, LatentSpec) else CudaStore


def block_elements(spec: CacheSpec | LatentSpec | RowsSpec, kv_dtype: str) -> int:
    """Elements of a block of the cache; of codes, bytes with their scales."""
    if isinstance(spec, LatentSpec):
        return latent_offsets(spec, kv_dtype)[1]
    if isinstance(spec, RowsSpec):
        return row_offsets(spec, kv_dtype)[1]
    return layer_offsets(spec, kv_dtype)[1]
