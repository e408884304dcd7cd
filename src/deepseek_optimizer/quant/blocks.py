"""Formats that hold ggml's K-quants, IQ4, 5-bit and MXFP4 blocks without loss: common packing, unpacking and error bound.

    W = scale * value(code) + minimum        value(code): code - offset, or an entry of a table

A code is stored as `low` + `high` bits in two planes of a group of 32 columns. Scales belong to 16 or 32 columns. In a
superblock of 256 columns they are small integers, multiplied by an fp16 number d of the superblock (minimums: dmin); otherwise
they are fp16 themselves, or powers of two. All these products are exact in float32. Source: ggml-common.h and ggml-quants.c of
llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch

from . import block_search
from .base import TILE_COLS, TILE_ROWS
from .groups import FP16_ROUNDING, FP16_TINY, round_scale
from .search import pad_importance
from .tiles import check_matrix, check_tiles, empty_tiles, pad_to_tiles, panels

SUPERBLOCK = 256  # columns
_GROUPS = SUPERBLOCK // TILE_COLS
# The values of IQ4 codes: kvalues_iq4nl of ggml.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # kvalues_mxfp4: twice the values of E2M1
_POWER_BIAS = 128  # one more than that of E8M0, since the values are doubled


@dataclass(frozen=True)
class Blocks:
    """The stored numbers of rows. n: rows, K: columns, `group`: 16 or 32.

    Attributes:
        codes: uint8 [n, K].
        scale: [n, K/group]; int8 in superblocks, uint8 e for a scale of 2^(e - 128), fp16 otherwise.
        minimum: like scale; None if the format has none.
        d: fp16 [n, K/256], the factor of scales; None without superblocks.
        dmin: like d, the factor of minimums.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None = None
    d: torch.Tensor | None = None
    dmin: torch.Tensor | None = None


class BlockFormat:
    """Base class of these formats; a subclass only sets the attributes. Methods as in `WeightFormat`.

    Attributes:
        low, high: bits of a code in each plane; 0: there is no such plane.
        group: columns per scale.
        superblock: see the module.
        powers: whether scales are powers of two.
        has_min: whether there are minimums.
        offset: subtracted from codes; 0 with a table.
        table: values of the codes; empty: none.
        most: the largest scale in a superblock; the smallest is 0 with minimums, and -most - 1 without.
        searched: whether scales and minimums are chosen by the error of the weights (`block_search.py`); otherwise they cover
            each group's range. Takes a while, and only few bits need it.
    """

    name: ClassVar[str]
    code: ClassVar[int]
    tile_bytes: ClassVar[int]
    bits: ClassVar[float]
    activation: ClassVar[str] = "q8"  # its error is a fraction of that of these formats, as for int4
    low: ClassVar[int] = 4
    high: ClassVar[int] = 0
    group: ClassVar[int] = 32
    superblock: ClassVar[bool] = True
    powers: ClassVar[bool] = False
    has_min: ClassVar[bool] = False
    offset: ClassVar[int] = 0
    table: ClassVar[tuple[int, ...]] = ()
    most: ClassVar[int] = 0
    searched: ClassVar[bool] = False

    @classmethod
    def pack(cls, weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """float [N, K] -> uint8 [ceil(N/16), ceil(K/32), tile_bytes]; formats that are not searched ignore `importance`."""
        check_matrix(weight)
        rows, cols = weight.shape
        cls.check_columns(cols)
        importance = pad_importance(importance, cols) if cls.searched else None
        out = empty_tiles(rows, cols, cls.tile_bytes)
        for begin, end in panels(rows, cols):
            blocks = cls._encode(pad_to_tiles(weight[begin:end].detach()), importance)
            cls.write(out[begin // TILE_ROWS : -(-end // TILE_ROWS)], blocks)
        return out

    @classmethod
    def unpack(cls, packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 tiles -> float [rows, cols]; products are exact in float32, and a sum with a minimum is rounded once."""
        cls.check_columns(cols)
        check_tiles(packed, rows, cols)
        out = torch.empty(rows, cols, dtype=dtype, device=packed.device)
        for begin, end in panels(rows, cols):
            values = cls.dequantize(cls.read(packed[begin // TILE_ROWS : -(-end // TILE_ROWS)]))
            out[begin:end] = values[: end - begin, :cols]
        return out

    @classmethod
    def error_bound(cls, weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Half a step or the distance to the last value, plus what rounding scales and minimums moves the values by."""
        groups = pad_to_tiles(weight).float().unflatten(1, (-1, cls.group))
        scale, minimum = cls._ranges(groups)
        if cls.searched and minimum is not None:
            bound = cls._searched_bound(scale, minimum) + 2.0**-20 * groups.abs().amax(-1)
            return bound.unsqueeze(-1).expand_as(groups).flatten(1)[: weight.shape[0], : weight.shape[1]]
        reach = max(abs(v) for v in cls.values())
        # In scales: half a step, or the distance past the last value on the side that has fewer (of IQ4: 127 - 113, of MXFP4:
        # 16 - 12).
        far = 4.0 if cls.powers else 14.0 if cls.table else 0.5 if cls.has_min else 1.0
        off = cls._rounding(scale)
        bound = far * (scale.abs() + off) + reach * off
        if minimum is not None:
            bound = bound + cls._rounding(minimum)
        bound = bound * (1 + 1e-5) + 2.0**-22 * groups.abs().amax(-1)
        return bound.unsqueeze(-1).expand_as(groups).flatten(1)[: weight.shape[0], : weight.shape[1]]

    @classmethod
    def _searched_bound(cls, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        """What a fit leaves out of a group's range, and what changes of integers and factors move its values by, [n, G]."""
        top, limits = len(cls.values()) - 1, []
        for numbers in (scale, minimum):
            step = numbers.abs().unflatten(1, (-1, SUPERBLOCK // cls.group)).amax(-1, keepdim=True) / cls.most
            moved = (0.5 + block_search.MOST_STEPS) * (1 + block_search.REFIT) * step
            limits.append(moved.expand(-1, -1, SUPERBLOCK // cls.group).flatten(1) + block_search.REFIT * numbers.abs())
        return block_search.WIDEST * top * scale + top * limits[0] + limits[1] + (top + 1) * cls.most * FP16_TINY

    @classmethod
    def check_columns(cls, cols: int) -> None:
        """ValueError unless a matrix of `cols` columns consists of whole superblocks."""
        if cls.superblock and cols % SUPERBLOCK:
            raise ValueError(f"{cls.name} needs a multiple of {SUPERBLOCK} columns, not {cols}")

    @classmethod
    def values(cls) -> tuple[int, ...]:
        """The value of each code, before scaling."""
        return cls.table or tuple(code - cls.offset for code in range(1 << (cls.low + cls.high)))

    @classmethod
    def dequantize(cls, blocks: Blocks) -> torch.Tensor:
        """The weights, float32 [n, K]."""
        values = blocks.codes.float() - cls.offset
        if cls.table:
            values = torch.tensor(cls.table, dtype=torch.float32, device=values.device)[blocks.codes.int()]
        groups = values.unflatten(1, (-1, cls.group)) * _scaled(blocks.scale, blocks.d).unsqueeze(-1)
        if blocks.minimum is not None:
            groups = groups + _scaled(blocks.minimum, blocks.dmin).unsqueeze(-1)
        return groups.flatten(1)

    # ---- tiles: [fp16 d[16], dmin[16] of a superblock] and its groups: [low plane][high plane][scales][minimums]

    @classmethod
    def write(cls, out: torch.Tensor, blocks: Blocks) -> None:
        """Writes blocks of n rows to the tiles `out`, uint8 [ceil(n/16), K/32, tile_bytes]; rows past n become zeros."""
        tiles, across, _ = out.shape
        missing = tiles * TILE_ROWS - blocks.codes.shape[0]
        codes = _pad_rows(blocks.codes, missing, cls.offset)
        head, body = cls._sections(out)
        width = cls.low + cls.high
        words = _to_planes(codes.view(-1, across, TILE_COLS), cls.low, cls.high)
        target = body.view(torch.int32)[..., : width * TILE_ROWS].unflatten(-1, (width, TILE_ROWS))
        target.copy_(words.view(tiles, TILE_ROWS, *body.shape[1:3], width).permute(0, 2, 3, 4, 1))
        numbers = cls._join([_pad_rows(x, missing) for x in (blocks.scale, blocks.minimum) if x is not None], across)
        target = body.view(numbers.dtype)[..., 4 * width * TILE_ROWS // numbers.itemsize :].unflatten(-1, (-1, TILE_ROWS))
        target.copy_(numbers.view(tiles, TILE_ROWS, *body.shape[1:3], -1).permute(0, 2, 3, 4, 1))
        if head is not None:
            factors = torch.stack([_pad_rows(x, missing) for x in (blocks.d, blocks.dmin) if x is not None], -1)
            target = head.view(torch.float16).unflatten(-1, (-1, TILE_ROWS))
            target.copy_(factors.view(tiles, TILE_ROWS, head.shape[1], -1).permute(0, 2, 3, 1))

    @classmethod
    def read(cls, tiles: torch.Tensor) -> Blocks:
        """The inverse of `write`: blocks of all rows of the tiles, padding included."""
        tiles = tiles.contiguous()
        rows, across = tiles.shape[0] * TILE_ROWS, tiles.shape[1]
        head, body = cls._sections(tiles)
        width = cls.low + cls.high
        words = body.view(torch.int32)[..., : width * TILE_ROWS].unflatten(-1, (width, TILE_ROWS))
        codes = _from_planes(words.permute(0, 4, 1, 2, 3).reshape(rows, across, width), cls.low, cls.high).view(rows, -1)
        dtype = torch.int8 if cls.superblock else torch.uint8 if cls.powers else torch.float16
        numbers = body.view(dtype)[..., 4 * width * TILE_ROWS // dtype.itemsize :].unflatten(-1, (-1, TILE_ROWS))
        parts = cls._split(numbers.permute(0, 4, 1, 2, 3).reshape(rows, across, -1))
        factors: tuple[torch.Tensor, ...] = ()
        if head is not None:
            halves = head.view(torch.float16).unflatten(-1, (-1, TILE_ROWS))
            factors = halves.permute(0, 3, 1, 2).reshape(rows, head.shape[1], -1).unbind(-1)
        d, dmin = (*factors, None, None)[:2]
        return Blocks(codes, parts[0], parts[1] if cls.has_min else None, d, dmin)

    @classmethod
    def _sections(cls, tiles: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Views of tiles: the superblocks' heads, uint8 [t, K/256, bytes], and groups, [t, K/256, 8, bytes]; without
        superblocks None, and [t, 1, K/32, tile_bytes]."""
        if not cls.superblock:
            return None, tiles.unsqueeze(1)
        whole = tiles.view(tiles.shape[0], -1, _GROUPS * cls.tile_bytes)
        head = 2 * TILE_ROWS * (2 if cls.has_min else 1)
        return whole[..., :head], whole[..., head:].unflatten(-1, (_GROUPS, -1))

    @classmethod
    def _join(cls, parts: list[torch.Tensor], across: int) -> torch.Tensor:
        """Scales and minimums of a group side by side, [n, K/32, vectors]."""
        return torch.cat([part.view(part.shape[0], across, -1) for part in parts], -1)

    @classmethod
    def _split(cls, numbers: torch.Tensor) -> list[torch.Tensor]:
        """The inverse of `_join`."""
        return [part.flatten(1) for part in numbers.chunk(2 if cls.has_min else 1, -1)]

    # ---- packing floats

    @classmethod
    def _encode(cls, panel: torch.Tensor, importance: torch.Tensor | None) -> Blocks:
        groups = panel.float().unflatten(1, (-1, cls.group))
        y = groups
        d: torch.Tensor | None
        offsets: torch.Tensor | None = None
        dmin: torch.Tensor | None = None
        if cls.searched:
            (stored, offsets), (d, dmin) = cls._search(groups.permute(2, 0, 1).contiguous(), importance)
        else:
            scale, minimum = cls._ranges(groups)
            stored, d = cls._integers(scale)
            if minimum is not None:
                offsets, dmin = cls._integers(minimum)
        if offsets is not None:
            y = groups - _scaled(offsets, dmin).unsqueeze(-1)
        factor = _scaled(stored, d).unsqueeze(-1)
        usable = factor.isfinite() & (factor != 0) & y.isfinite()
        y = (y / factor.masked_fill(factor == 0, 1.0)).masked_fill(~usable, 0.0)
        if cls.table:
            order = sorted(range(len(cls.table)), key=cls.table.__getitem__)
            middles = [(cls.table[a] + cls.table[b]) / 2 for a, b in pairwise(order)]
            index = torch.bucketize(y, torch.tensor(middles, dtype=torch.float32, device=y.device))
            codes = torch.tensor(order, dtype=torch.int64, device=y.device)[index]
            if cls.powers:  # the format has no NaN: groups that are not finite become infinite
                codes = codes.masked_fill(stored.unsqueeze(-1) == 255, cls.table.index(max(cls.table)))
        else:
            codes = (y.round() + cls.offset).clamp_(0, (1 << (cls.low + cls.high)) - 1)
        return Blocks(codes.to(torch.uint8).flatten(1), stored, offsets, d, dmin)

    @classmethod
    def _search(
        cls, x: torch.Tensor, importance: torch.Tensor | None
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Integers and factors of scales and minimums, for x [group, n, G]; importance: [K]."""
        weights = x.abs() if importance is None else importance.view(-1, cls.group).t().unsqueeze(1)
        top = len(cls.values()) - 1
        scale, minimum = block_search.ranges(x, weights, top)
        (stored, d), (offsets, dmin) = cls._integers(scale), cls._integers(minimum)
        assert d is not None and dmin is not None  # in superblocks
        return block_search.integers(x, weights, (stored, offsets), (d, dmin), top, cls.most)

    @classmethod
    def _ranges(cls, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ideal scales and minimums of groups [n, G, group], float32 [n, G]."""
        if cls.has_min:
            low = groups.amin(-1).clamp_max(0)
            return (groups.amax(-1).clamp_min(0) - low) / ((1 << (cls.low + cls.high)) - 1), low
        if cls.powers:  # the largest element is at least 8 and less than 16
            return torch.exp2(groups.abs().amax(-1).log2().floor() - 3), None
        high, low = groups.amax(-1), groups.amin(-1)
        return torch.where(high >= -low, high, low) / cls.values()[0], None

    @classmethod
    def _integers(cls, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales or minimums as stored, [n, G], and their factor, fp16 [n, K/256]."""
        if cls.powers:
            exponents = (numbers.log2() + _POWER_BIAS).nan_to_num(nan=255, posinf=255, neginf=0)
            return exponents.clamp_(0, 255).to(torch.uint8), None
        if not cls.superblock:
            return round_scale(numbers), None
        wide = numbers.unflatten(1, (-1, SUPERBLOCK // cls.group))
        high, low = wide.amax(-1), wide.amin(-1)
        factor = round_scale(torch.where(high >= -low, high, low) / cls.most)
        divisor = factor.float().unsqueeze(-1)
        usable = divisor.isfinite() & (divisor != 0)
        whole = (wide / divisor.masked_fill(~usable, 1.0)).round_().masked_fill_(~usable, 0.0)
        least = 0 if cls.has_min else -cls.most - 1
        return whole.clamp_(least, cls.most).flatten(1).to(torch.int8), factor

    @classmethod
    def _rounding(cls, numbers: torch.Tensor) -> torch.Tensor:
        """Maximum error of storing these scales or minimums, [n, G]."""
        if cls.powers:
            return torch.full_like(numbers, 2.0**-_POWER_BIAS)
        if not cls.superblock:
            return (numbers.abs() * FP16_ROUNDING).clamp_min(FP16_TINY)
        largest = numbers.abs().unflatten(1, (-1, SUPERBLOCK // cls.group)).amax(-1, keepdim=True)
        step = largest / cls.most
        rounding = (step * FP16_ROUNDING).clamp_min(FP16_TINY)
        return (step / 2 + rounding * (cls.most + 1)).expand(-1, -1, SUPERBLOCK // cls.group).flatten(1)


def _scaled(numbers: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """Scales or minimums as float32 [n, G], multiplied by the factor of their superblock."""
    if numbers.dtype == torch.uint8:
        return torch.exp2(numbers.double() - _POWER_BIAS).float()
    if factor is None:
        return numbers.float()
    return (numbers.float().unflatten(1, (factor.shape[1], -1)) * factor.float().unsqueeze(-1)).flatten(1)


def _pad_rows(x: torch.Tensor, missing: int, value: int = 0) -> torch.Tensor:
    return torch.cat([x, x.new_full((missing, *x.shape[1:]), value)]) if missing else x.contiguous()


def _mask(bits: int) -> int:
    return ((1 << bits) - 1) * 0x01010101


def _to_planes(codes: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Codes uint8 [n, g, 32] -> int32 words [n, g, low + high]. A word of a plane of b bits joins 8/b words of 4 codes."""
    words = codes.contiguous().view(torch.int32)
    planes = []
    for bits, source in ((low, words), (high, words >> low)):
        if bits:
            parts = (source & _mask(bits)).unflatten(-1, (bits, 8 // bits)).unbind(-1)
            planes.append(torch.stack([part << (bits * i) for i, part in enumerate(parts)]).sum(0, dtype=torch.int32))
    return torch.cat(planes, -1)


def _from_planes(words: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The inverse of `_to_planes`."""
    codes = torch.zeros(*words.shape[:-1], TILE_COLS // 4, dtype=torch.int32, device=words.device)
    at = 0
    for bits, shift in ((low, 0), (high, low)):
        if bits:
            plane = words[..., at : at + bits]
            parts = torch.stack([(plane >> (bits * i)) & _mask(bits) for i in range(8 // bits)], -1).flatten(-2)
            codes |= parts << shift
            at += bits
    return codes.view(torch.uint8)
