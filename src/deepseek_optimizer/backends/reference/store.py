"""Paged caches as torch tensors [blocks, 32, ...], several per layer: keys and values, or latents."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ...errors import BackendError
from ...graph.ir import CacheSpec, LatentSpec, StateSpec
from ...graph.rope_rotation import KeyRotation, Pairs
from ..base import BLOCK_TOKENS, Int32
from . import int4_rows
from .ops import rope
from .states import StateSlots, state_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}  # int4: two in a byte
SCALED = ("int8", "int4")  # with a float32 scale per row
LATENT_GROUP = 128  # elements of an int8 or int4 latent that share a scale


def store_block_bytes(spec: CacheSpec | LatentSpec, kv_dtype: str) -> int:
    """Bytes of one block of the largest group of layers. int8 and int4 have a float32 scale per token and head, or per group of
    a token's latent; the rotated keys of an int8 latent cache are bf16, those of an int4 latent cache int8, and the indexer's
    keys are bf16 in both."""
    dtype, packed = _dtype(kv_dtype), _packed(kv_dtype)
    if isinstance(spec, LatentSpec):
        scales = 4 * _groups(spec.rank) if kv_dtype in SCALED else 0
        rotated = spec.rope + 4 * _groups(spec.rope) if kv_dtype == "int4" else spec.rope * _unquantized(dtype).itemsize
        index = spec.index * _unquantized(dtype).itemsize
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


def _dtype(kv_dtype: str) -> torch.dtype:
    try:
        return DTYPES[kv_dtype]
    except KeyError:
        raise BackendError(f"unknown KV cache dtype {kv_dtype!r}; choose one of {', '.join(DTYPES)}") from None


def _packed(kv_dtype: str) -> int:
    """Elements of a cache in one element of a tensor."""
    return 2 if kv_dtype == "int4" else 1


def _unquantized(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a latent cache's indexer keys, and of its rotated keys unless it is int4."""
    return torch.bfloat16 if dtype in (torch.int8, torch.uint8) else dtype


def _groups(elements: int) -> int:
    return -(-elements // LATENT_GROUP)


class _Blocks:
    """Blocks stored in tensors [blocks, 32, ...]. Memory grows with the highest block written."""

    def __init__(self, spec: CacheSpec | LatentSpec, kv_dtype: str, num_blocks: int) -> None:
        self.kv_dtype, self.num_blocks = kv_dtype, num_blocks
        self.block_bytes = store_block_bytes(spec, kv_dtype)
        self.states = StateSlots((), 0, torch.device("cpu"))  # `make_store` sets those of a graph
        self._data: list[torch.Tensor] = []
        self._scales: list[torch.Tensor] = []  # of int8 and int4 elements

    def copy_block(self, source: int, target: int) -> None:
        self._grow(max(source, target) + 1)
        for tensor in self._tensors:
            tensor[target] = tensor[source]

    def release(self, from_block: int) -> None:
        self._resize(min(from_block, len(self._data[0])))

    @property
    def _tensors(self) -> list[torch.Tensor]:
        """All tensors with elements: an indexer's keys may have width 0."""
        return [tensor for tensor in (*self._data, *self._scales) if tensor.shape[-1]]

    @property
    def saved_bytes(self) -> int:
        return sum(t.element_size() * math.prod(t.shape[1:]) for t in self._tensors)

    def read_block(self, block: int) -> bytes:
        self._grow(block + 1)
        return b"".join(t[block].contiguous().cpu().view(torch.uint8).numpy().tobytes() for t in self._tensors)

    def write_block(self, block: int, data: bytes) -> None:
        if len(data) != self.saved_bytes:
            raise ValueError(f"a block has {self.saved_bytes} bytes, got {len(data)}")
        self._grow(block + 1)
        rest, at = bytearray(data), 0
        for tensor in self._tensors:
            row = tensor[block]
            row.copy_(torch.frombuffer(rest, dtype=tensor.dtype, count=row.numel(), offset=at).view(row.shape))
            at += row.nbytes

    @property
    def num_states(self) -> int:
        return self.states.slots

    @property
    def state_bytes(self) -> int:
        return state_bytes(self.states.specs)

    def copy_state(self, source: int, target: int) -> None:
        self.states.copy(source, target)

    def release_states(self, from_slot: int) -> None:
        self.states.release(from_slot)

    def read_state(self, slot: int) -> bytes:
        return self.states.read_bytes(slot)

    def write_state(self, slot: int, data: bytes) -> None:
        self.states.write_bytes(slot, data)

    def rotate(self, rotation: KeyRotation, block_table: Int32, tokens: int, position: int, delta: int, group: int = 0) -> None:
        rotation.check(position + tokens)
        if min(position, position + delta) < 0 or tokens < 0:
            raise ValueError(f"{tokens} tokens from position {position} cannot move by {delta}")
        table = self._table(block_table, tokens)[: -(-tokens // BLOCK_TOKENS)]
        if len(table.unique()) != len(table) or (table < 0).any():
            raise ValueError(f"block_table must have distinct, non-negative blocks, got {table.tolist()}")
        if delta and tokens:
            angles = _angle_table(rotation.inv_freq, position, len(table) * BLOCK_TOKENS, delta, table.device)
            rotated = list(self._rotated(rotation, table, angles, group))  # computed before anything is written
            for tensor, rows in rotated:
                tensor[table] = rows.to(tensor.dtype)

    def _rotated(
        self, rotation: KeyRotation, blocks: torch.Tensor, angles: torch.Tensor, group: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The tensors that the rotation changes, each with its new rows for the blocks."""
        raise NotImplementedError

    def _places(self, table: torch.Tensor, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks and slots of a sequence's tokens [start, start + count); allocates memory for them."""
        tokens = torch.arange(start, start + count, device=table.device, dtype=torch.int64)
        blocks = table[tokens // BLOCK_TOKENS]
        self._grow(int(blocks.max()) + 1)
        return blocks, tokens % BLOCK_TOKENS

    def _table(self, block_table: Int32, tokens: int) -> torch.Tensor:
        table = torch.from_numpy(block_table).to(self._data[0].device, torch.int64)
        if len(table) * BLOCK_TOKENS < tokens:
            raise BackendError(f"block_table has {len(table)} blocks, too few for {tokens} tokens")
        if tokens and int(table.max()) >= len(self._data[0]):
            raise BackendError(f"block {int(table.max())} was never written")
        return table

    def _grow(self, blocks: int) -> None:
        allocated = len(self._data[0])
        if blocks > self.num_blocks:
            raise BackendError(f"block {blocks - 1} is outside the cache of {self.num_blocks} blocks")
        if blocks > allocated:
            self._resize(min(self.num_blocks, max(blocks, 2 * allocated)))

    def _resize(self, blocks: int) -> None:
        for tensors in (self._data, self._scales):
            for i, old in enumerate(tensors):
                tensors[i] = old.new_zeros((blocks, *old.shape[1:]))
                common = min(blocks, len(old))
                tensors[i][:common] = old[:common]


class TorchStore(_Blocks):
    """Implements `KvStore`: a row of K and V of all layers per token, and one of their scales. Layers of different groups share
    the elements: a block holds either the one's or the other's.

    int8: scale = max|x| / 127 per token and head, q = rint(x / scale). int4: see `int4_rows`, a row per token and head. Copies
    of the newest tokens are int8, in the bytes of int4 elements.
    """

    def __init__(self, spec: CacheSpec, kv_dtype: str, num_blocks: int, device: torch.device) -> None:
        super().__init__(spec, kv_dtype, num_blocks)
        self._groups = [*(spec.group_of(layer) for layer in range(spec.layers)), *spec.newest_groups]
        self._layers = spec.layers
        self._parts, elements, scales = _parts_of(spec)
        self._packed = _packed(kv_dtype)
        self._data = [torch.zeros((0, BLOCK_TOKENS, elements // self._packed), dtype=_dtype(kv_dtype), device=device)]
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
        return int4_rows.dequantized(rows, scales) if self._is_int4(layer) else rows.float() * scales[..., None]

    def _quantized(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return int4_rows.quantized(rows) if self._is_int4(layer) else _quantized(rows)

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


class LatentStore(_Blocks):
    """Implements `KvStore`: per token a latent of `rank` elements, a rotated key of `rope`, and an indexer's key of `index`.

    int8: latents only, scale = max|x| / 127 per group of 128 elements (the last may be shorter), q = rint(x / scale). int4: a
    row of `int4_rows` per group of 128 elements of a latent, and the rotated key as int8 latents.
    """

    def __init__(self, spec: LatentSpec, kv_dtype: str, num_blocks: int, device: torch.device) -> None:
        super().__init__(spec, kv_dtype, num_blocks)
        self.spec, dtype, others = spec, _dtype(kv_dtype), _unquantized(_dtype(kv_dtype))
        rotated = torch.int8 if kv_dtype == "int4" else others
        for width, kind in ((spec.rank // _packed(kv_dtype), dtype), (spec.rope, rotated), (spec.index, others)):
            self._data += [torch.zeros((0, BLOCK_TOKENS, width), dtype=kind, device=device) for _ in range(spec.layers)]
        scaled = {"int8": (spec.rank,), "int4": (spec.rank, spec.rope)}.get(kv_dtype, ())  # the latents', then the keys'
        self._scales = [
            torch.zeros((0, BLOCK_TOKENS, _groups(elements)), device=device, dtype=torch.float32)
            for elements in scaled
            for _ in range(spec.layers)
        ]

    def write(self, layer: int, table: torch.Tensor, start: int, rows: torch.Tensor) -> None:
        """Writes latents and rotated keys, float [n, rank + rope], to tokens [start, start + n) of a sequence."""
        at, spec = self._places(table, start, len(rows)), self.spec
        latent, rotated = rows.split((spec.rank, spec.rope), -1)
        if self.kv_dtype == "int8":
            latent, self._scales[layer][at] = _quantized_groups(latent.float())
        elif self.kv_dtype == "int4":
            codes = [int4_rows.quantized(group) for group in latent.float().split(LATENT_GROUP, -1)]
            latent, self._scales[layer][at] = torch.cat([c for c, _ in codes], -1), torch.stack([s for _, s in codes], -1)
            rotated, self._scales[layer + spec.layers][at] = _quantized_groups(rotated.float())
        for i, part in ((layer, latent), (layer + spec.layers, rotated)):
            self._data[i][at] = part.to(self._data[i].dtype)

    def gather(self, layer: int, table: torch.Tensor, tokens: int) -> torch.Tensor:
        """Latents and rotated keys of a sequence's first `tokens` tokens, float32 [tokens, rank + rope]."""
        latent, rotated = (self._rows(self._data[i], table, tokens) for i in (layer, layer + self.spec.layers))
        if self.kv_dtype == "int8":
            latent = _dequantized_groups(latent.float(), self._rows(self._scales[layer], table, tokens))
        elif self.kv_dtype == "int4":
            scales, of_keys = (self._rows(self._scales[i], table, tokens) for i in (layer, layer + self.spec.layers))
            groups = zip(latent.split(LATENT_GROUP // 2, -1), scales.unbind(-1), strict=True)
            latent = torch.cat([int4_rows.dequantized(codes, scale) for codes, scale in groups], -1)
            rotated = _dequantized_groups(rotated.float(), of_keys)
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
                keys = _dequantized_groups(data[blocks].float(), scales[blocks])
                rows, new = _quantized_groups(_rotate(keys[..., None, :], angles, rotation.key)[..., 0, :])
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


Store = TorchStore | LatentStore


def make_store(
    spec: CacheSpec | LatentSpec,
    kv_dtype: str,
    num_blocks: int,
    device: torch.device,
    states: tuple[StateSpec, ...] = (),
    num_states: int = 0,
) -> Store:
    """An empty cache of `num_blocks` blocks and `num_states` slots for recurrent states."""
    kind = LatentStore if isinstance(spec, LatentSpec) else TorchStore
    store = kind(spec, kv_dtype, num_blocks, device)  # type: ignore[arg-type]
    store.states = StateSlots(states, num_states, device)
    return store


def _quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x quantized along its last axis to integers from -127 to 127, and their scales."""
    scale = x.abs().amax(-1) / 127
    return torch.round(x / torch.where(scale == 0, 1.0, scale)[..., None]), scale


def _quantized_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_quantized`, with a scale for each group of LATENT_GROUP elements: [..., n], [..., groups]."""
    padded = F.pad(x, (0, _groups(x.shape[-1]) * LATENT_GROUP - x.shape[-1]))
    rows, scales = _quantized(padded.unflatten(-1, (-1, LATENT_GROUP)))
    return rows.flatten(-2)[..., : x.shape[-1]], scales


def _dequantized_groups(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return rows * scales.repeat_interleave(LATENT_GROUP, -1)[..., : rows.shape[-1]]


def _angle_table(inv_freq: np.ndarray, position: int, count: int, delta: int, device: torch.device) -> torch.Tensor:
    """cos and sin, float32 [count, rot], of the angles between positions position + t and position + t + delta: RoPE's are
    float32 products, and their differences are taken in double, so that rotations add up to the final position's angle."""
    positions = torch.arange(position, position + count, device=device, dtype=torch.int64)
    frequencies = torch.from_numpy(inv_freq).to(device)
    old, new = ((at[:, None].float() * frequencies).double() for at in (positions, positions + delta))
    return torch.cat(((new - old).cos(), (new - old).sin()), -1).float()


def _rotate(key: torch.Tensor, angles: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Rotates keys float32 [blocks, 32, heads, width] by a table [blocks * 32, rot]."""
    rows = rope(key.flatten(0, 1).flatten(1), angles, key.shape[2], pairs.interleaved, pairs.offset)
    return rows.view(key.shape)
