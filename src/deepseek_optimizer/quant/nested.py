"""int8_nested: int8 (8.5 bits per weight) that contains an int4 matrix, int4_nested, which products can read alone.

A code q in [-128, 119] is 16 * upper + lower, with upper in [-8, 7] and lower in [-8, 7]: q / 16, rounded, and the rest. The
upper parts with 16 times the scale are an int4 matrix. A row of tiles begins with its tiles, in the layout of `int4.py`, with
this scale; the lower parts of the row follow. Reading the upper parts alone takes 9/17 of the memory traffic, in long runs.

The element of largest magnitude becomes -128, as ggml's Q4_0 makes it -8, unless one of the other sign would exceed 119.
(Quantized models that contain others: Nair et al. 2025, "Matryoshka Quantization"; Park et al. 2024, "Any-Precision LLM".)
"""

from __future__ import annotations

from typing import ClassVar

import torch

from .base import TILE_ROWS
from .groups import grouped, join_nibbles, round_scale, scale_error, split_nibbles, ungroup
from .search import by_column, nearest
from .tiles import check_matrix, check_tiles, empty_tiles, pad_to_tiles, panels, read_tiles, write_tiles

LOWEST, HIGHEST, OFFSET = -128, 119, 136  # of codes, and what is added to them when they are stored
_TILE, _REST = 288, 256  # bytes of a tile of the int4 matrix, and of the lower parts of its codes


class Int8Nested:
    """544 bytes per tile: of a tile row, the tiles of an int4 matrix (288 bytes each), then the lower parts of all their codes
    (256 bytes each), uint8 [4 j][16 r][4] = nibbles in the same order. Stored are q + 136 and scale[16] = 16 s; W = s * q."""

    name: ClassVar[str] = "int8_nested"
    code: ClassVar[int] = 17
    tile_bytes: ClassVar[int] = _TILE + _REST
    bits: ClassVar[float] = 8.5
    activation: ClassVar[str] = "q16"

    @staticmethod
    def pack(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """float [N, K] -> uint8 [ceil(N/16), ceil(K/32), 544]."""
        check_matrix(weight)
        out = empty_tiles(weight.shape[0], weight.shape[1], Int8Nested.tile_bytes)
        for begin, end in panels(*weight.shape):
            groups = grouped(pad_to_tiles(weight[begin:end].detach()))
            sixteen = _scale(groups)
            codes = _codes(groups, sixteen).to(torch.uint8)
            upper, lower = planes(out[begin // TILE_ROWS : -(-end // TILE_ROWS)])
            write_tiles(upper, join_nibbles((codes >> 4).view(torch.int32)), (sixteen,))
            write_tiles(lower, join_nibbles((codes & 15).view(torch.int32)))
        return out

    @staticmethod
    def unpack(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 tiles -> float [rows, cols]; exact in float32."""
        return _unpack(packed, rows, cols, dtype, nested=False)

    @staticmethod
    def error_bound(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Half a step, plus the error that rounding the scale to fp16 causes in the largest element."""
        return _bound(weight, steps=1)


class Int4Nested:
    """The int4 matrix inside `Int8Nested`: the same bytes, of which the lower parts are not read. W = 16 s * upper."""

    name: ClassVar[str] = "int4_nested"
    code: ClassVar[int] = 18
    tile_bytes: ClassVar[int] = Int8Nested.tile_bytes
    bits: ClassVar[float] = 8.5
    activation: ClassVar[str] = "q8"

    @staticmethod
    def pack(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """As `Int8Nested.pack`."""
        return Int8Nested.pack(weight, importance)

    @staticmethod
    def unpack(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 tiles -> float [rows, cols]; exact in float32."""
        return _unpack(packed, rows, cols, dtype, nested=True)

    @staticmethod
    def error_bound(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Half a step of int8_nested and 8 of the 16 in one of int4, plus what rounding the scale to fp16 causes."""
        return _bound(weight, steps=17)


NESTED = {Int8Nested.name: Int4Nested.name}  # formats that contain another, whose products read less


def planes(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of tiles uint8 [..., t, g, 544]: those of the int4 matrix [..., t, g, 288], and the rest [..., t, g, 256]."""
    groups = tiles.shape[-2]
    rows = tiles.flatten(-2)
    upper, lower = rows[..., : groups * _TILE], rows[..., groups * _TILE :]
    return upper.unflatten(-1, (groups, _TILE)), lower.unflatten(-1, (groups, _REST))


def unread_bytes(tiles: torch.Tensor) -> int:
    """How many bytes of tiles products with int4_nested do not read."""
    return tiles.numel() // Int4Nested.tile_bytes * _REST


def columns(tiles: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Groups [begin, end) of tiles uint8 [..., t, g, 544], as tiles of their own: [..., t, end - begin, 544]."""
    upper, lower = (plane[..., begin:end, :].flatten(-2) for plane in planes(tiles))
    return torch.cat((upper, lower), -1).unflatten(-1, (end - begin, _TILE + _REST))


def _scale(groups: torch.Tensor) -> torch.Tensor:
    """16 steps of groups float32 [n, g, 32]: fp16 [n, g], negative where the element of largest magnitude is positive."""
    above, below = groups.amax(-1).clamp_min_(0), (-groups.amin(-1)).clamp_min_(0)
    step = torch.maximum(torch.maximum(above, below) / 8, torch.minimum(above, below) * 16 / HIGHEST)
    return round_scale(torch.where(below < above, -step, step))


def _codes(groups: torch.Tensor, sixteen: torch.Tensor) -> torch.Tensor:
    """Stored codes, float32 [n, g, 32], of groups float32 [n, g, 32] with scales fp16 [n, g]."""
    codes = nearest(by_column(groups), sixteen.float() / 16, LOWEST, HIGHEST)
    return codes.masked_fill_(~sixteen.isfinite(), 0.0).add_(OFFSET).permute(1, 2, 0).contiguous()


def _unpack(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype, *, nested: bool) -> torch.Tensor:
    check_tiles(packed, rows, cols)
    out = torch.empty(rows, cols, dtype=dtype, device=packed.device)
    for begin, end in panels(rows, cols):
        upper, lower = planes(packed[begin // TILE_ROWS : -(-end // TILE_ROWS)].contiguous())
        words, (sixteen,) = read_tiles(upper, words=4, halves=1)
        codes = split_nibbles(words).float() - 8
        scale = sixteen.float()
        if not nested:
            codes = codes * 16 + (split_nibbles(read_tiles(lower, words=4)[0]).float() - 8)
            scale = scale / 16
        values = codes * scale.unsqueeze(-1)
        out[begin:end] = values.flatten(1)[: end - begin, :cols]
    return out


def _bound(weight: torch.Tensor, steps: int) -> torch.Tensor:
    """Half of `steps` steps, and the rounding of 16 of them to fp16, of which a code has up to 8."""
    groups = grouped(pad_to_tiles(weight))
    above, below = groups.amax(-1, keepdim=True).clamp_min(0), (-groups.amin(-1, keepdim=True)).clamp_min(0)
    sixteen = torch.maximum(torch.maximum(above, below) / 8, torch.minimum(above, below) * 16 / HIGHEST)
    error = (sixteen + scale_error(sixteen)) / 32 * steps + 8.5 * scale_error(sixteen)
    return ungroup(error.expand_as(groups), weight)
