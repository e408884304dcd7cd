"""int3: trellis codes of 3 bits (`trellis.py`), groups of 32 columns with an 8-bit scale each (3.25 bits per weight).

A scale is an fp16 number without its sign and its 7 last bits. The first candidate makes the element of largest magnitude the
largest value; of it and its neighbors, the one with the smallest weighted error wins.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from .base import TILE_COLS, TILE_ROWS, Packer, Parameters
from .groups import grouped, round_scale, ungroup
from .search import by_column, pad_importance
from .tiles import check_matrix, check_tiles, empty_tiles, pad_to_tiles, panels, read_tiles, write_tiles
from .trellis import COLUMNS, TOP, VALUES, decode, encode, least_error

# Candidates of a group's scale: the byte that covers the range of its elements, plus each of these.
STEPS = (0, -1, 1, -2, 2, -3, 3, -4)
_NAN, _INFINITE = 0xFC, 0xF8  # the byte of fp16's NaN, and the first that is not finite
_QUADS = tuple(column // 4 for column in COLUMNS[:8])  # bit of a byte of the path's plane -> its 4 columns


class Int3:
    """208 bytes per tile: u [2 v][16 r][4], as a plane of 2 bits; b uint8 [16 r][4], bit t of byte c: column 4 q[t] + c with
    q = 1, 3, 0, 2, 5, 7, 4, 6; uint8 s[16], the upper bits of an fp16 number. W = scale * value, see `trellis.py`."""

    name: ClassVar[str] = "int3"
    code: ClassVar[int] = 16
    tile_bytes: ClassVar[int] = 208
    bits: ClassVar[float] = 3.25
    activation: ClassVar[str] = "q8"
    run: ClassVar[int] = TILE_COLS  # the codes of a group form one path

    @staticmethod
    def pack(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """float [N, K], importance float32 [K] -> uint8 [ceil(N/16), ceil(K/32), 208]."""
        check_matrix(weight)
        rows, cols = weight.shape
        if importance is None:
            importance = torch.ones(cols, dtype=torch.float32, device=weight.device)
        padded = pad_importance(importance, cols)
        assert padded is not None
        weights = padded.view(-1, TILE_COLS).t().unsqueeze(1)
        out = empty_tiles(rows, cols, Int3.tile_bytes)
        for begin, end in panels(rows, cols):
            x = by_column(grouped(pad_to_tiles(weight[begin:end].detach())))
            scale = choose_scale(x, weights)
            _write(out[begin // TILE_ROWS : -(-end // TILE_ROWS)], quantize(x, scale, weights), scale)
        return out

    @staticmethod
    def unpack(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 tiles -> float [rows, cols]; exact in float32."""
        check_tiles(packed, rows, cols)
        out = torch.empty(rows, cols, dtype=dtype, device=packed.device)
        for begin, end in panels(rows, cols):
            codes, scale = _read(packed[begin // TILE_ROWS : -(-end // TILE_ROWS)])
            values = dequantize(codes, scale).permute(1, 2, 0).flatten(1)
            out[begin:end] = values[: end - begin, :cols]
        return out

    @staticmethod
    def error_bound(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """The largest distance to a value of any subset, with the largest and the smallest candidate scale."""
        groups = grouped(pad_to_tiles(weight))
        first = _first(groups.abs().amax(-1))
        high, low = (_scale(_near(first, step)).unsqueeze(-1) for step in (max(STEPS), min(STEPS)))
        gap = max((b - a) / 2 for a, b in zip(VALUES, VALUES[4:], strict=False))
        bound = torch.maximum(high * max(gap, TOP - VALUES[12]), groups.abs() - low * VALUES[12])
        bound = torch.where((first == 0).unsqueeze(-1), groups.abs(), bound * (1 + 1e-5))
        return ungroup(bound, weight)

    @staticmethod
    def rounded(x: torch.Tensor, importance: torch.Tensor, packer: Packer) -> tuple[torch.Tensor, Parameters]:
        codes, scale = _read(packer(x.t().contiguous(), Int3.name, importance=importance))
        return codes[:, : x.shape[1], 0], (scale[: x.shape[1], 0],)

    @staticmethod
    def values(codes: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        return dequantize(codes.to(torch.uint8), parameters[0])

    @staticmethod
    def tiles(codes: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        rows, cols = codes.shape
        out = empty_tiles(rows, cols, Int3.tile_bytes)
        missing = len(out) * TILE_ROWS - rows
        padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, 0, 0, missing))
        scale = torch.nn.functional.pad(parameters[0], (0, 0, 0, missing))
        _write(out, padded.unflatten(1, (-1, TILE_COLS)).permute(2, 0, 1).contiguous(), scale)
        return out


def choose_scale(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns the best scales of groups, as stored: uint8 [n, g].

    Args:
        x: float32 [32, n, g].
        weights: of the squared errors, float32 [32, 1, g] or [32, n, g].
    """
    first = _first(x.abs().amax(0))
    blank = _blank(first)
    shown, spread = x.masked_fill(blank, 0.0), weights.expand_as(x).flatten(1)
    best = chosen = None
    for step in STEPS:
        byte = _near(first, step)
        scale = _scale(byte)
        error = least_error((shown * (1 / scale)).flatten(1), spread).view_as(scale) * (scale * scale)
        if best is None or chosen is None:
            best, chosen = error, byte
        else:
            chosen = torch.where(error < best, byte, chosen)
            best = torch.minimum(error, best)
    assert chosen is not None
    return torch.where(blank, first, chosen)


def quantize(x: torch.Tensor, scale: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns the codes of groups, uint8 [32, n, g]; zeros where a scale is 0 or NaN.

    Args:
        x: float32 [32, n, g].
        scale: as stored, uint8 [n, g].
        weights: of the squared errors, float32 [32, 1, g] or [32, n, g].
    """
    blank = _blank(scale)
    y = x.masked_fill(blank, 0.0) * (1 / _scale(scale.masked_fill(blank, 1)))
    return encode(y.flatten(1), weights.expand_as(x).flatten(1)).view_as(x).masked_fill_(blank, 0)


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns the weights that codes [32, n, g] and scales, uint8 [n, g], stand for: float32 [32, n, g]."""
    return decode(codes) * _scale(scale)


def _first(largest: torch.Tensor) -> torch.Tensor:
    """The scale that makes magnitude `largest` the largest value, as stored: uint8 of the same shape; NaN if it overflows."""
    half = round_scale(largest / TOP).view(torch.int16).int()
    byte = (half + 64) >> 7
    return byte.masked_fill_(byte >= _INFINITE, _NAN).to(torch.uint8)


def _blank(byte: torch.Tensor) -> torch.Tensor:
    """Whether a scale is 0 or not finite."""
    return (byte == 0) | (byte >= _INFINITE)


def _near(first: torch.Tensor, step: int) -> torch.Tensor:
    """The scale that is `step` candidates larger, or the nearest that is above 0 and finite."""
    return (first.int() + step).clamp_(1, _INFINITE - 1).to(torch.uint8)


def _scale(byte: torch.Tensor) -> torch.Tensor:
    """Stored scales as float32."""
    return (byte.to(torch.int16) << 7).view(torch.float16).float()


def _write(out: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """Writes codes, uint8 [32, 16t, g], and scales, uint8 [16t, g], to tiles, uint8 [t, g, 208]."""
    words = codes.permute(1, 2, 0).contiguous().view(torch.int32)
    low = words & 0x03030303
    planes = low[..., 0::4] | low[..., 1::4] << 2 | low[..., 2::4] << 4 | low[..., 3::4] << 6
    path = torch.zeros_like(words[..., 0])
    for t, quad in enumerate(_QUADS):
        path |= (words[..., quad] >> 2 & 0x01010101) << t
    write_tiles(out, torch.cat((planes, path.unsqueeze(-1)), -1))
    tiles, groups, _ = out.shape
    out[..., -TILE_ROWS:] = scale.view(tiles, TILE_ROWS, groups).transpose(1, 2)


def _read(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `_write`."""
    words, _ = read_tiles(tiles, words=3)
    codes = torch.empty(*words.shape[:2], 8, dtype=torch.int32, device=tiles.device)
    for quad in range(8):
        low = words[..., quad // 4] >> 2 * (quad % 4) & 0x03030303
        codes[..., quad] = low | (words[..., 2] >> _QUADS.index(quad) & 0x01010101) << 2
    scale = tiles[..., -TILE_ROWS:].transpose(1, 2).reshape(-1, tiles.shape[1])
    return codes.view(torch.uint8).permute(2, 0, 1).contiguous(), scale
