"""int4: symmetric, groups of 32 columns, one fp16 scale each (4.5 bits). ggml's Q4_0 is the same numbers.

The scale is ggml's: the element of largest magnitude becomes exactly -8, so that all 16 values serve on its side.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from .groups import grouped, join_nibbles, quantise, round_scale, scale_error, split_nibbles, to_words, ungroup
from .tiles import pack_panels, pad_to_tiles, unpack_panels


class Int4:
    """288 bytes a tile: nibbles [4 j][16 r][4] = w + 8 (low: 8j + b, high: 8j + 4 + b), fp16 scale[16]; W = scale * w."""

    name: ClassVar[str] = "int4"
    code: ClassVar[int] = 3
    tile_bytes: ClassVar[int] = 288
    bits: ClassVar[float] = 4.5
    activation: ClassVar[str] = "q8"

    @staticmethod
    def pack(weight: torch.Tensor) -> torch.Tensor:
        """float [N, K] -> uint8 [ceil(N/16), ceil(K/32), 288]."""
        return pack_panels(weight, Int4.tile_bytes, _encode)

    @staticmethod
    def unpack(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 tiles -> float [rows, cols]; exact in float32."""
        return unpack_panels(packed, rows, cols, dtype, _decode, words=4, halves=1)

    @staticmethod
    def error_bound(weight: torch.Tensor) -> torch.Tensor:
        """Half a step, or the way to 7 steps for elements that point against the largest; and the rounding of the scale."""
        groups = grouped(pad_to_tiles(weight))
        step = _largest(groups).unsqueeze(-1) / -8
        # Elements against the largest have the step's sign: they end at 7 steps, not at 8.
        clipped = torch.where(groups.sign() == step.sign(), groups.abs() - 7 * step.abs(), 0.0)
        return ungroup(torch.maximum(step.abs() / 2, clipped) + 8.5 * scale_error(step), weight)


def _largest(groups: torch.Tensor) -> torch.Tensor:
    """The element of largest magnitude, with its sign, the first of equals: [n, g, 32] -> [n, g]."""
    high, low = groups.amax(-1), groups.amin(-1)
    largest = torch.where(high >= -low, high, low)  # a NaN is in both, and stays
    equals = (high == -low).nonzero(as_tuple=True)  # rare: only here does order matter
    if equals[0].numel():
        tied = groups[equals]
        largest[equals] = tied.gather(-1, tied.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return largest


def _encode(panel: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    groups = grouped(panel)
    scale = round_scale(_largest(groups) / -8)
    return join_nibbles(to_words(quantise(groups, scale, -8, 7).add_(8))), (scale,)


def _decode(words: torch.Tensor, halves: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return (split_nibbles(words).float() - 8) * halves[0].float().unsqueeze(-1)
