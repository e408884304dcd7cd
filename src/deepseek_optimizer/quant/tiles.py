"""The tile layout of all packed formats.

A tile is 16 rows x 32 columns. Every format encodes a row's 32 columns as `words` consecutive 32-bit words (fp32: 32, bf16: 16,
int8: 8, 4-bit: 4), and a tile stores them transposed, [words][16 rows], so that one vector load reads the same columns of 16
rows. They are followed by the fp16 values of each row of the tile (scale, minimum), 16 of each. A format only defines how a
row's columns become words and fp16 values; the transposition is done here.

Matrices are processed in panels of rows, so that temporary memory is a few panels for a matrix of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..system.tensor_memory import weight_memory
from .base import PANEL_ROWS, TILE_COLS, TILE_ROWS

PANEL_ELEMENTS = 1 << 19  # 2 MB as float32: about the size of an L2 cache

# A panel float [16t, 32g] -> int32 words [16t, g, words] and fp16 values, each [16t, g].
Encode = Callable[[torch.Tensor], tuple[torch.Tensor, tuple[torch.Tensor, ...]]]
# The inverse: int32 words [16t, g, words] and fp16 values [16t, g] -> float32 [16t, g, 32].
Decode = Callable[[torch.Tensor, tuple[torch.Tensor, ...]], torch.Tensor]


def tile_counts(rows: int, cols: int) -> tuple[int, int]:
    """Number of tiles that cover a matrix, vertically and horizontally."""
    return -(-rows // TILE_ROWS), -(-cols // TILE_COLS)


def empty_tiles(rows: int, cols: int, tile_bytes: int) -> torch.Tensor:
    """Uninitialized tiles of a matrix, uint8 [ceil(rows/16), ceil(cols/32), tile_bytes]."""
    return weight_memory().empty((*tile_counts(rows, cols), tile_bytes), torch.uint8)


def empty_stack(count: int, rows: int, cols: int, tile_bytes: int) -> torch.Tensor:
    """Uninitialized tiles of `count` matrices, uint8 [count, ceil(rows/16), ceil(cols/32), tile_bytes]."""
    return weight_memory().empty((count, *tile_counts(rows, cols), tile_bytes), torch.uint8)


def panels(rows: int, cols: int, elements: int = PANEL_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Yields row ranges [begin, end) of about `elements` elements; every begin is a multiple of PANEL_ROWS."""
    step = max(PANEL_ROWS, elements // max(cols, 1) // PANEL_ROWS * PANEL_ROWS)
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def pad_to_tiles(panel: torch.Tensor) -> torch.Tensor:
    """Pads [n, K] with zeros to contiguous [ceil16(n), ceil32(K)]."""
    tiles, groups = tile_counts(*panel.shape)
    if panel.shape == (tiles * TILE_ROWS, groups * TILE_COLS):
        return panel.contiguous()
    padded = panel.new_zeros(tiles * TILE_ROWS, groups * TILE_COLS)
    padded[: panel.shape[0], : panel.shape[1]] = panel
    return padded


def write_tiles(out: torch.Tensor, words: torch.Tensor, halves: tuple[torch.Tensor, ...] = ()) -> None:
    """Writes int32 words [16t, g, n] and 16-bit values [16t, g] to the tiles `out`, uint8 [t, g, tile_bytes]."""
    tiles, groups, _ = out.shape
    n = words.shape[-1]
    target = out.view(torch.int32)[..., : n * TILE_ROWS].view(tiles, groups, n, TILE_ROWS)
    target.copy_(words.view(tiles, TILE_ROWS, groups, n).permute(0, 2, 3, 1))
    shorts = out.view(torch.int16)[..., 2 * n * TILE_ROWS :]
    for i, half in enumerate(halves):
        column = half.view(torch.int16).view(tiles, TILE_ROWS, groups).transpose(1, 2)
        shorts[..., i * TILE_ROWS : (i + 1) * TILE_ROWS].copy_(column)


def read_tiles(tiles: torch.Tensor, words: int, halves: int = 0) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Reads tiles, uint8 [t, g, tile_bytes], to int32 words [16t, g, words] and `halves` tensors of fp16 [16t, g]."""
    down, across, _ = tiles.shape
    tiles = tiles.contiguous()
    source = tiles.view(torch.int32)[..., : words * TILE_ROWS].view(down, across, words, TILE_ROWS)
    rows = source.permute(0, 3, 1, 2).contiguous().view(down * TILE_ROWS, across, words)
    shorts = tiles.view(torch.float16)[..., 2 * words * TILE_ROWS :]
    columns = (shorts[..., i * TILE_ROWS : (i + 1) * TILE_ROWS] for i in range(halves))
    return rows, tuple(column.transpose(1, 2).reshape(down * TILE_ROWS, across) for column in columns)


def check_matrix(weight: torch.Tensor) -> None:
    """Raises ValueError unless it can be packed."""
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"weight must be a float32, bfloat16 or float16 matrix, not {weight.dtype} {tuple(weight.shape)}")


def check_tiles(packed: torch.Tensor, rows: int, cols: int) -> None:
    """Raises ValueError unless they are the tiles of a matrix of this shape."""
    if packed.dtype != torch.uint8 or packed.dim() != 3 or tuple(packed.shape[:2]) != tile_counts(rows, cols):
        raise ValueError(f"packed must be tiles of a {rows} x {cols} matrix, not {packed.dtype} {tuple(packed.shape)}")


def pack_panels(weight: torch.Tensor, tile_bytes: int, encode: Encode) -> torch.Tensor:
    """Packs float [N, K] into uint8 tiles [ceil(N/16), ceil(K/32), tile_bytes]."""
    check_matrix(weight)
    out = empty_tiles(weight.shape[0], weight.shape[1], tile_bytes)
    for begin, end in panels(*weight.shape):
        words, halves = encode(pad_to_tiles(weight[begin:end].detach()))
        write_tiles(out[begin // TILE_ROWS : -(-end // TILE_ROWS)], words, halves)
    return out


def tiles_of(words: torch.Tensor, halves: tuple[torch.Tensor, ...], tile_bytes: int) -> torch.Tensor:
    """Tiles of rows that are already encoded: int32 words [N, g, n] and fp16 [N, g] -> uint8 [ceil(N/16), g, tile_bytes].

    Missing rows of the last tile are filled with zeros.
    """
    out = empty_tiles(words.shape[0], words.shape[1] * TILE_COLS, tile_bytes)
    missing = -words.shape[0] % TILE_ROWS
    pad = torch.nn.functional.pad
    write_tiles(out, pad(words, (0, 0, 0, 0, 0, missing)), tuple(pad(half, (0, 0, 0, missing)) for half in halves))
    return out


def unpack_panels(
    packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype, decode: Decode, words: int, halves: int = 0
) -> torch.Tensor:
    """Unpacks uint8 tiles to [rows, cols] of `dtype`, computed in float32."""
    check_tiles(packed, rows, cols)
    out = torch.empty(rows, cols, dtype=dtype, device=packed.device)
    for begin, end in panels(rows, cols):
        values = decode(*read_tiles(packed[begin // TILE_ROWS : -(-end // TILE_ROWS)], words, halves))
        out[begin:end] = values.flatten(1)[: end - begin, :cols]
    return out
