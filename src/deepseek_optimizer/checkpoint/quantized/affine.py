"""Rows of integer codes with a scale, and possibly a zero point, for each group of columns: W = scale * (code - zero).

What most quantizers store. The codes are kept where a weight format can hold them:

| format | holds | if |
|---|---|---|
| int4 | code - zero | it is in [-8, 7]: symmetric 4-bit codes, all 2-bit ones |
| q4_1 | code, with -scale * zero as the minimum | codes are in [0, 15] |
| int8 | code - zero | it is in [-128, 127] |

and if each 32 columns are in one group. Scales and minima become float16, which is exact for most symmetric checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...quant.base import TILE_COLS
from ...quant.codes import int4_blocks, int8_blocks, q4_1_blocks
from .matrix import Kept, StoredRows

_HOLDS = {"int4": (-8, 7), "int8": (-128, 127)}


@dataclass(frozen=True)
class AffineRows(StoredRows):
    """n rows of a matrix.

    Attributes:
        codes: integers [n, K]: uint8, or int8 without zero points.
        scales: float32 [n, G].
        zeros: int16 [n, G]; None: all are `zero`.
        zero: the zero point of all groups if there are no `zeros`.
        size: columns of a group; the last may have fewer.
        group_of: the group of each column, int64 [K]; None: column k is in group k // size.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    zero: int
    size: int
    group_of: torch.Tensor | None = None

    def floats(self) -> torch.Tensor:
        signed = self.codes.float()
        signed = signed - self.zero if self.zeros is None else signed - self._each(self.zeros.float())
        return signed * self._each(self.scales)

    def kept(self, format: str) -> Kept | None:
        if self.group_of is not None or (self.scales.shape[1] > 1 and self.size % TILE_COLS):
            return None
        if format == "q4_1":
            return self._kept_q4_1()
        if format not in _HOLDS:
            return None
        codes = self._signed()
        low, high = _HOLDS[format]
        scale = self._blocks(self.scales)
        half = scale.to(torch.float16)
        if int(codes.min()) < low or int(codes.max()) > high or not half.isfinite().all():
            return None
        blocks = int4_blocks(codes, half) if format == "int4" else int8_blocks(codes, half)
        return Kept(blocks, bool((half.float() == scale).all()))

    def _signed(self) -> torch.Tensor:
        """code - zero: int8 for codes of up to 4 bits, int16 for others."""
        largest_zero = self.zero if self.zeros is None else int(self.zeros.max())
        small = self.codes.dtype == torch.uint8 and largest_zero <= 16 and int(self.codes.max()) <= 15
        dtype = torch.int8 if small else torch.int16
        codes = self.codes.view(dtype) if small else self.codes.to(dtype)
        return codes - (self.zero if self.zeros is None else self._each(self.zeros.to(dtype)))

    def _kept_q4_1(self) -> Kept | None:
        if int(self.codes.min()) < 0 or int(self.codes.max()) > 15:
            return None
        zeros = torch.full_like(self.scales, self.zero) if self.zeros is None else self.zeros.float()
        scale, minimum = self._blocks(self.scales), self._blocks(-self.scales * zeros)
        halves = scale.to(torch.float16), minimum.to(torch.float16)
        if not all(half.isfinite().all() for half in halves):
            return None
        exact = all(bool((half.float() == full).all()) for half, full in zip(halves, (scale, minimum), strict=True))
        return Kept(q4_1_blocks(self.codes, *halves), exact)

    def _each(self, values: torch.Tensor) -> torch.Tensor:
        """The value of each column's group: [n, G] -> [n, K], or [n, 1] if there is one group."""
        if values.shape[1] == 1:
            return values
        if self.group_of is not None:
            return values[:, self.group_of]
        return values.repeat_interleave(self.size, 1)[:, : self.codes.shape[1]]

    def _blocks(self, values: torch.Tensor) -> torch.Tensor:
        """The value of each 32 columns: [n, G] -> [n, ceil(K/32)]."""
        blocks = -(-self.codes.shape[1] // TILE_COLS)
        if values.shape[1] == 1:
            return values.expand(-1, blocks)
        return values.repeat_interleave(self.size // TILE_COLS, 1)[:, :blocks]


def formats_of(bits: int, symmetric: bool, kept: bool) -> tuple[str | None, str]:
    """The lossless format (if scales are float16 values) and the natural one of a matrix of such codes.

    Args:
        bits: of a code.
        symmetric: whether the zero point is always the middle code.
        kept: whether each 32 columns are in one group.
    """
    if kept and bits == 2:
        return "int4", "int4"
    if kept and symmetric:
        exact = "int4" if bits <= 4 else "int8"
        return exact, exact
    return None, "q4_1" if bits <= 4 else "int8"


def group_label(size: int, cols: int) -> str:
    """A group size as reports name it."""
    return "per channel" if size >= cols else f"group {size}"
