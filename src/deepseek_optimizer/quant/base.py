"""What a weight format is.

A packed matrix [N, K] is a uint8 tensor of shape [ceil(N/16), ceil(K/32), tile_bytes]: tiles of 16 rows x 32 columns, the
layout of `native/include/dso.h`, the same on every ISA and on disk. Each format has one file, whose `pack` and `unpack` are
plain torch: the definition that the native packer must equal bit for bit, and what serves where there is no native build.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch

TILE_ROWS, TILE_COLS = 16, 32
PANEL_ROWS = 128  # rows that are packed apart from others begin at a multiple of it: the tallest block with a scale (fp8)


class Packer(Protocol):
    """Float matrix [N, K], format name -> uint8 tiles, in `out` where it is given (contiguous, of the tiles' shape).

    `importance`: float32 [K], finite, not negative: how much an error in a column weighs. int4 and q4_1 choose their scales by
    it (`search.py`); the others don't read it. A uint8 matrix is rows of ggml blocks of the type with this format's own numbers
    (see `ggml.py`): repacked, nothing rounded. A float8_e4m3fn matrix with its blocks' `scale`, float32 [ceil(N/128),
    ceil(K/128)], becomes "fp8" as it is. Parts of a matrix may be packed apart where they begin at a multiple of PANEL_ROWS.
    A backend hands its own packer in; this package imports no backend.
    """

    def __call__(
        self,
        weight: torch.Tensor,
        name: str,
        out: torch.Tensor | None = None,
        importance: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


class WeightFormat(Protocol):
    """One format. `code`: DSO_* of dso.h. `activation`: slot kind its products read: "f32", "bf16", "q8" or "q16"."""

    name: ClassVar[str]
    code: ClassVar[int]
    tile_bytes: ClassVar[int]
    bits: ClassVar[float]
    activation: ClassVar[str]

    @staticmethod
    def pack(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """float [N, K], and see `Packer` for importance -> uint8 [ceil(N/16), ceil(K/32), tile_bytes]."""

    @staticmethod
    def unpack(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 tiles -> float [rows, cols]; exact in float32."""

    @staticmethod
    def error_bound(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """float [N, K]: what |unpack(pack(w, importance)) - w| never exceeds, element by element."""
