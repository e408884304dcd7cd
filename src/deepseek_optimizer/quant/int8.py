"""int8: symmetric, groups of 32 columns, one fp16 scale each (8.5 bits per weight). ggml's Q8_0 represents the same values."""

from __future__ import annotations

from typing import ClassVar

import torch

from .base import Parameters
from .groups import grouped, quantize, round_scale, scale_error, to_words, ungroup
from .search import nearest, scale_for
from .tiles import pack_panels, pad_to_tiles, read_tiles, tiles_of, unpack_panels


class Int8:
    """544 bytes per tile: uint8 [8 k/4][16 r][4] = w + 128, fp16 scale[16]. W = scale * w, scale = max|W| / 127."""

    name: ClassVar[str] = "int8"
    code: ClassVar[int] = 2
    tile_bytes: ClassVar[int] = 544
    bits: ClassVar[float] = 8.5
    activation: ClassVar[str] = "q16"
    run: ClassVar[int] = 1

    @staticmethod
    def pack(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """float [N, K] -> uint8 [ceil(N/16), ceil(K/32), 544]."""
        return pack_panels(weight, Int8.tile_bytes, _encode)

    @staticmethod
    def unpack(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 tiles -> float [rows, cols]; exact in float32."""
        return unpack_panels(packed, rows, cols, dtype, _decode, words=8, halves=1)

    @staticmethod
    def error_bound(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Half a step, plus the error that rounding the scale to fp16 causes in the largest element."""
        groups = grouped(pad_to_tiles(weight))
        step = groups.abs().amax(-1, keepdim=True) / 127
        return ungroup((step / 2 + 127.5 * scale_error(step)).expand_as(groups), weight)

    @staticmethod
    def fit(x: torch.Tensor, importance: torch.Tensor) -> Parameters:
        return (round_scale(x.abs().amax(0) / 127),)

    @staticmethod
    def refit(x: torch.Tensor, codes: torch.Tensor, importance: torch.Tensor) -> Parameters:
        return (scale_for(x, codes, importance),)

    @staticmethod
    def codes(x: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        return nearest(x, parameters[0], -127, 127)

    @staticmethod
    def values(codes: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        return codes * parameters[0].float()

    @staticmethod
    def parameters(tiles: torch.Tensor) -> Parameters:
        return read_tiles(tiles, words=8, halves=1)[1]

    @staticmethod
    def tiles(codes: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        return tiles_of(to_words(grouped(codes) + 128), parameters, Int8.tile_bytes)


def _encode(panel: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    groups = grouped(panel)
    scale = round_scale(groups.abs().amax(-1) / 127)
    return to_words(quantize(groups, scale, -127, 127).add_(128)), (scale,)


def _decode(words: torch.Tensor, halves: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return (words.view(torch.uint8).float() - 128) * halves[0].float().unsqueeze(-1)
