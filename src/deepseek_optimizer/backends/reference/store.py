"""Paged caches as torch tensors [blocks, 32, ...], several per layer: keys and values, or latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...graph.ir import CacheSpec, LatentSpec, RowsSpec, StateSpec
from ...graph.rope_rotation import KeyRotation, Pairs
from ..base import BLOCK_TOKENS, Int32
from . import int4_rows
from .block_tensors import BlockTensors
from .ops import rope
from .rows_store import RowsOfBlocks, rows_block_bytes
from .scaled_rows import (
    LARGEST,
    LATENT_GROUP,
    SCALED,
    dequantized,
    dequantized_groups,
    dtype_of,
    groups_of,
    packed_elements,
    quantized,
    quantized_groups,
    unquantized,
)
from .states import StateSlots


def store_block_bytes(spec: CacheSpec | LatentSpec | RowsSpec, kv_dtype: str) -> int:
    """Bytes of one block of the largest group of layers. int8, fp8 and int4 have a float32 scale per token and head, or per
    group of a token's latent; the rotated keys of an int8 or fp8 latent cache are bf16, those of an int4 latent cache int8, and
    the indexer's keys are bf16 in all three."""
    if isinstance(spec, RowsSpec):
        return rows_block_bytes(spec, kv_dtype)
    dtype, packed = dtype_of(kv_dtype), packed_elements(kv_dtype)
    if isinstance(spec, LatentSpec):
        scales = 4 * groups_of(spec.rank) if kv_dtype in SCALED else 0
        rotated = spec.rope + 4 * groups_of(spec.rope) if kv_dtype == "int4" else spec.rope * unquantized(dtype).itemsize
        index = spec.index * unquantized(dtype).itemsize
        return spec.layers * BLOCK_TOKENS * (spec.rank * dtype.itemsize // packed + scales + rotated + index)
    *_, elements, scales = _parts_of(spec)
    return BLOCK_TOKENS * (elements * dtype.itemsize // packed + (4 * scales if kv_dtype in SCALED else 0))


@dataclass(frozen=True)
class _Part:
    """A layer's keys or values in a token's row of elements, and in its row of scales."""

    at: int
    scales_at: int
    kv_heads: int
    head_dim: int

    def elements(self, rows: torch.Tensor, packed: int = 1) -> torch.Tensor:
        """[..., elements / packed] -> a view [..., kv_heads, head_dim / packed]."""
        end = self.at + self.kv_heads * self.head_dim
        return rows[..., self.at // packed : end // packed].unflatten(-1, (self.kv_heads, self.head_dim // packed))

    def scales(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., scales] -> a view [..., kv_heads]."""
        return rows[..., self.scales_at : self.scales_at + self.kv_heads]


def _parts_of(spec: CacheSpec) -> tuple[list[tuple[_Part, _Part]], int, int]:
    """Keys and values of each layer, then of each copy, and the lengths of the rows of elements and scales: those of the
    largest group. Elements of copies are as long as two int4 ones."""
    ends, parts = [(0, 0)] * spec.groups, []
    layers = [(spec.group_of(layer), *spec.heads_of(layer)) for layer in range(spec.layers)]
    copies = [
        (group, kv_heads, 2 * head_dim)
        for group, (kv_heads, head_dim) in zip(spec.newest_groups, spec.heads if spec.newest else (), strict=True)
    ]
    for group, kv_heads, head_dim in (*layers, *copies):
        at, scales_at = ends[group]
        size = kv_heads * head_dim
        parts.append((_Part(at, scales_at, kv_heads, head_dim), _Part(at + size, scales_at + kv_heads, kv_heads, head_dim)))
        ends[group] = at + 2 * size, scales_at + 2 * kv_heads
    return parts, max(at for at, _ in ends), max(at for _, at in ends)


class TorchStore(BlockTensors):
    """Implements `KvStore`: a row of K and V of all layers per token, and one of their scales. Layers of different groups share
    the elements: a block holds either the one's or the other's.

    int8 and fp8: see `scaled_rows`, int4: see `int4_rows`, a row per token and head. Copies of the newest tokens are int8, in
    the bytes of int4 elements.
    """

    def __init__(self, spec: CacheSpec, kv_dtype: str, num_blocks: int, device: torch.device) -> None:
        super().__init__(store_block_bytes(spec, kv_dtype), kv_dtype, num_blocks)
        self._groups = [*(spec.group_of(layer) for layer in range(spec.layers)), *spec.newest_groups]
        self._layers = spec.layers
        self._parts, elements, scales = _parts_of(spec)
        self._packed = packed_elements(kv_dtype)
        self._codes = "fp8" if kv_dtype == "fp8" else "int8"  # of layers, and of copies, that are not int4
        self._data = [torch.zeros((0, BLOCK_TOKENS, elements // self._packed), dtype=dtype_of(kv_dtype), device=device)]
        if kv_dtype in SCALED:
            self._scales = [torch.zeros((0, BLOCK_TOKENS, scales), dtype=torch.float32, device=device)]

    def write(self, layer: int, table: torch.Tensor, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Writes K and V, float [n, kv_heads, head_dim], to tokens [start, start + n) of a sequence.

        Args:
            layer: the layer, or the number of layers + the layer for its copy.
            table: int64 [blocks], the sequence's blocks in the group of the layer, or of the copy.
        """
        at = self._places(table, start, len(key))
        for part, rows in zip(self._parts[layer], (key, value), strict=True):
            data = self._elements(layer, part)
            if self.kv_dtype in SCALED:
                rows, part.scales(self._scales[0])[at] = self._quantized(layer, rows.float())
            data[at] = rows.to(data.dtype)

    def gather(self, layer: int, table: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a sequence's first `tokens` tokens, float32 [tokens, kv_heads, head_dim]; `layer` as in `write`."""
        key, value = (self._dequantized(layer, part, table[: -(-tokens // BLOCK_TOKENS)]) for part in self._parts[layer])
        return key.flatten(0, 1)[:tokens], value.flatten(0, 1)[:tokens]

    def _is_int4(self, layer: int) -> bool:
        return self.kv_dtype == "int4" and layer < self._layers

    def _elements(self, layer: int, part: _Part) -> torch.Tensor:
        """A view of all elements of a layer or copy, as they are stored."""
        data = part.elements(self._data[0], self._packed)
        return data.view(torch.int8) if layer >= self._layers else data

    def _dequantized(self, layer: int, part: _Part, blocks: torch.Tensor) -> torch.Tensor:
        """float32 [blocks, 32, kv_heads, head_dim]."""
        rows = self._elements(layer, part)[blocks]
        if self.kv_dtype not in SCALED:
            return rows.float()
        scales = part.scales(self._scales[0])[blocks]
        return int4_rows.dequantized(rows, scales) if self._is_int4(layer) else dequantized(rows, scales, self._codes)

    def _quantized(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return int4_rows.quantized(rows) if self._is_int4(layer) else quantized(rows, self._codes)

    def _rotated(
        self, rotation: KeyRotation, blocks: torch.Tensor, angles: torch.Tensor, group: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for layer, (part, _) in enumerate(self._parts):
            if self._groups[layer] != group:
                continue
            key = _rotate(self._dequantized(layer, part, blocks), angles, rotation.key)
            if self.kv_dtype in SCALED:
                key, scales = self._quantized(layer, key)
                yield part.scales(self._scales[0]), scales
            yield self._elements(layer, part), key

    def read(self, layer: int, block_table: Int32, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self.gather(layer, self._table(block_table, tokens), tokens)
        return key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()


class LatentStore(BlockTensors):
    """Implements `KvStore`: per token a latent of `rank` elements, a rotated key of `rope`, and an indexer's key of `index`.

    int8 and fp8: latents only, a row of `scaled_rows` per group of 128 elements (the last may be shorter). int4: a row of
    `int4_rows` per group of 128 elements of a latent, and the rotated key as int8 latents.
    """

    def __init__(self, spec: LatentSpec, kv_dtype: str, num_blocks: int, device: torch.device) -> None:
        super().__init__(store_block_bytes(spec, kv_dtype), kv_dtype, num_blocks)
        self.spec, dtype, others = spec, dtype_of(kv_dtype), unquantized(dtype_of(kv_dtype))
        rotated = torch.int8 if kv_dtype == "int4" else others
        for width, kind in ((spec.rank // packed_elements(kv_dtype), dtype), (spec.rope, rotated), (spec.index, others)):
            self._data += [torch.zeros((0, BLOCK_TOKENS, width), dtype=kind, device=device) for _ in range(spec.layers)]
        scaled = {"int8": (spec.rank,), "fp8": (spec.rank,), "int4": (spec.rank, spec.rope)}.get(
            kv_dtype, ()
        )  # the latents', then the keys'
        self._scales = [
            torch.zeros((0, BLOCK_TOKENS, groups_of(elements)), device=device, dtype=torch.float32)
            for elements in scaled
            for _ in range(spec.layers)
        ]

    def write(self, layer: int, table: torch.Tensor, start: int, rows: torch.Tensor) -> None:
        """Writes latents and rotated keys, float [n, rank + rope], to tokens [start, start + n) of a sequence."""
        at, spec = self._places(table, start, len(rows)), self.spec
        latent, rotated = rows.split((spec.rank, spec.rope), -1)
        if self.kv_dtype in LARGEST:
            latent, self._scales[layer][at] = quantized_groups(latent.float(), self.kv_dtype)
        elif self.kv_dtype == "int4":
            codes = [int4_rows.quantized(group) for group in latent.float().split(LATENT_GROUP, -1)]
            latent, self._scales[layer][at] = torch.cat([c for c, _ in codes], -1), torch.stack([s for _, s in codes], -1)
            rotated, self._scales[layer + spec.layers][at] = quantized_groups(rotated.float())
        for i, part in ((layer, latent), (layer + spec.layers, rotated)):
            self._data[i][at] = part.to(self._data[i].dtype)

    def gather(self, layer: int, table: torch.Tensor, tokens: int) -> torch.Tensor:
        """Latents and rotated keys of a sequence's first `tokens` tokens, float32 [tokens, rank + rope]."""
        latent, rotated = (self._rows(self._data[i], table, tokens) for i in (layer, layer + self.spec.layers))
        if self.kv_dtype in LARGEST:
            latent = dequantized_groups(latent, self._rows(self._scales[layer], table, tokens), self.kv_dtype)
        elif self.kv_dtype == "int4":
            scales, of_keys = (self._rows(self._scales[i], table, tokens) for i in (layer, layer + self.spec.layers))
            groups = zip(latent.split(LATENT_GROUP // 2, -1), scales.unbind(-1), strict=True)
            latent = torch.cat([int4_rows.dequantized(codes, scale) for codes, scale in groups], -1)
            rotated = dequantized_groups(rotated, of_keys)
        return torch.cat((latent.float(), rotated.float()), -1)

    def write_index(self, layer: int, table: torch.Tensor, start: int, keys: torch.Tensor) -> None:
        """Writes the indexer's keys, float [n, index], to tokens [start, start + n) of a sequence."""
        at = self._places(table, start, len(keys))
        data = self._data[layer + 2 * self.spec.layers]
        data[at] = keys.to(data.dtype)

    def gather_index(self, layer: int, table: torch.Tensor, tokens: int) -> torch.Tensor:
        """The indexer's keys of a sequence's first `tokens` tokens, float32 [tokens, index]."""
        return self._rows(self._data[layer + 2 * self.spec.layers], table, tokens).float()

    def _rotated(
        self, rotation: KeyRotation, blocks: torch.Tensor, angles: torch.Tensor, group: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        layers = self.spec.layers
        if (rotation.index is None) != (self.spec.index == 0):
            raise ValueError(f"rotation.index is {rotation.index}, but the cache's index keys have {self.spec.index} elements")
        parts = [(self._data[layers : 2 * layers], rotation.key)]
        if self.kv_dtype == "int4":
            for data, scales in zip(parts.pop()[0], self._scales[layers:], strict=True):
                keys = dequantized_groups(data[blocks], scales[blocks])
                rows, new = quantized_groups(_rotate(keys[..., None, :], angles, rotation.key)[..., 0, :])
                yield scales, new
                yield data, rows
        if rotation.index is not None:
            parts.append((self._data[2 * layers :], rotation.index))
        for tensors, pairs in parts:
            for data in tensors:
                yield data, _rotate(data[blocks].float()[..., None, :], angles, pairs)[..., 0, :]

    def read(self, layer: int, block_table: Int32, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        table = self._table(block_table, tokens)
        return self.gather(layer, table, tokens), self.gather_index(layer, table, tokens) if self.spec.index else None

    @staticmethod
    def _rows(data: torch.Tensor, table: torch.Tensor, tokens: int) -> torch.Tensor:
        return data[table[: -(-tokens // BLOCK_TOKENS)]].flatten(0, 1)[:tokens]


class RowsStore(BlockTensors):
    """Implements `KvStore`: rows of several kinds in blocks of bytes; see `rows_store`."""

    def __init__(self, spec: RowsSpec, kv_dtype: str, num_blocks: int, device: torch.device) -> None:
        super().__init__(rows_block_bytes(spec, kv_dtype), kv_dtype, num_blocks)
        self._kinds = RowsOfBlocks(spec, kv_dtype)
        self._data = [torch.zeros((0, self.block_bytes), dtype=torch.uint8, device=device)]

    def write(self, kind: int, table: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Stores rows of a kind of one sequence.

        Args:
            table: int64 [blocks], the sequence's blocks in the kind's group.
            rows: int64 [n], their numbers.
            values: float [n, width].
        """
        at = self._of_rows(kind, table, rows)
        if len(rows):
            self._grow(int(at[0].max()) + 1)
            self._kinds.write(self._data[0], kind, at, values)

    def gather(self, kind: int, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """These rows of a kind of one sequence, float32 [n, width]; arguments as in `write`."""
        return self._kinds.read(self._data[0], kind, self._of_rows(kind, table, rows))

    def _of_rows(self, kind: int, table: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks and places of rows, each of which is stored with the last of its tokens."""
        every = self._kinds.spec.rows[kind].every
        last = (rows + 1) * every - 1
        return table[last // BLOCK_TOKENS], last % BLOCK_TOKENS // every

    def read(self, layer: int, block_table: Int32, tokens: int) -> tuple[torch.Tensor, None]:
        table, count = self._table(block_table, tokens), tokens // self._kinds.spec.rows[layer].every
        return self.gather(layer, table, torch.arange(count, device=table.device, dtype=torch.int64)), None


Store = TorchStore | LatentStore | RowsStore


def make_store(
    spec: CacheSpec | LatentSpec | RowsSpec,
    kv_dtype: str,
    num_blocks: int,
    device: torch.device,
    states: tuple[StateSpec, ...] = (),
    num_states: int = 0,
) -> Store:
    """An empty cache of `num_blocks` blocks and `num_states` slots for recurrent states."""
    kind = {LatentSpec: LatentStore, RowsSpec: RowsStore}.get(type(spec), TorchStore)
    store: Store = kind(spec, kv_dtype, num_blocks, device)
    store.states = StateSlots(states, num_states, device)
    return store


def _rotate(key: torch.Tensor, angles: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Rotates keys float32 [blocks, 32, heads, width] by a table [blocks * 32, rot]."""
    rows = rope(key.flatten(0, 1).flatten(1), angles, key.shape[2], pairs.interleaved, pairs.offset)
    return rows.view(key.shape)
