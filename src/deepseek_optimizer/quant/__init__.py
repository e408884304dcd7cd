"""Weight formats, one per file, looked up by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import torch

from ..errors import ConfigError
from . import fp8, ggml
from .base import PANEL_ROWS, TILE_COLS, TILE_ROWS, GroupFormat, Packer, WeightFormat, WholeGroups
from .bf16 import Bf16
from .fp8 import Fp8
from .fp32 import Fp32
from .int3 import Int3
from .int4 import Int4
from .int8 import Int8
from .kquants import BLOCK_FORMATS
from .nested import NESTED, Int4Nested, Int8Nested
from .packed import ColumnOrder, PackedMatrix, PackedStack, PackedWeight
from .q4_1 import Q4_1

FORMATS: Mapping[str, WeightFormat] = MappingProxyType(
    {f.name: f for f in (Fp32(), Bf16(), Int8(), Int8Nested(), Int4(), Int3(), Q4_1(), Fp8(), *BLOCK_FORMATS)}
)
# Formats that are read out of others, in which matrices are packed.
VIEWS: Mapping[str, WeightFormat] = MappingProxyType({"int4_nested": Int4Nested()})
# Formats that compensated rounding supports (`compensation.py`).
GROUP_FORMATS: Mapping[str, GroupFormat | WholeGroups] = MappingProxyType(
    {"int8": Int8(), "int4": Int4(), "q4_1": Q4_1(), "int3": Int3()}
)

QUANT_METHOD: Final = "deepseek_optimizer"  # the name of these formats in a config.json
WEIGHED = frozenset({"int3", "int4", "q4_1", "q2_k"})  # formats whose scales depend on the columns' importance
SUPERBLOCKS = frozenset(f.name for f in BLOCK_FORMATS if f.superblock)  # formats of matrices with a multiple of 256 columns


def get_format(name: str) -> WeightFormat:
    """Returns the format called `name`; ConfigError, which suggests the closest name, if there is none."""
    if isinstance(name, str) and (found := FORMATS.get(name) or VIEWS.get(name)):
        return found
    near = difflib.get_close_matches(str(name), FORMATS, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"unknown weight format {name!r}{hint} (supported: {', '.join(FORMATS)})")


def reference_packer(
    weight: torch.Tensor,
    name: str,
    out: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Packs in plain torch: the `Packer` to use if the native library was not built."""
    if weight.dtype == torch.float8_e4m3fn:
        fp8.check_target(name)
        tiles = fp8.repack(weight, scale)
    elif weight.dtype == torch.uint8:
        tiles = ggml.repack(weight, *ggml.blocks_for(name, weight.shape[1]))
    else:
        tiles = get_format(name).pack(weight, importance)
    return tiles if out is None else out.copy_(tiles)


def pack(
    weight: torch.Tensor, name: str, packer: Packer = reference_packer, importance: torch.Tensor | None = None
) -> PackedMatrix:
    """Packs a matrix.

    Args:
        weight: float [N, K].
        name: of the format.
        packer: the implementation, see `Packer`.
        importance: float32 [K], see `Packer`.

    Raises:
        ConfigError: there is no such format.
    """
    get_format(name)
    return PackedMatrix(name, weight.shape[0], weight.shape[1], packer(weight, name, importance=importance))


def unpack(matrix: PackedMatrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns the whole matrix as float [rows, cols]."""
    values = get_format(matrix.format).unpack(matrix.data, matrix.rows, matrix.cols, dtype)
    return values if matrix.order is None else matrix.order.restored(values)


def take_rows(matrix: PackedMatrix, index: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns rows `index` (integers of any shape [...]) as float [..., cols]: an embedding lookup.

    Raises:
        IndexError: an index is not a row of the matrix.
    """
    flat = index.reshape(-1)
    if flat.numel() and not (0 <= int(flat.min()) and int(flat.max()) < matrix.rows):
        raise IndexError(f"row index out of range: it must be in [0, {matrix.rows})")
    # A tile row holds 16 rows; unpack each one that is needed, once.
    tiles, place = torch.unique(flat // TILE_ROWS, return_inverse=True)
    rows = unpack(replace(matrix, rows=tiles.numel() * TILE_ROWS, data=matrix.data[tiles]), dtype)
    return rows[place * TILE_ROWS + flat % TILE_ROWS].reshape(*index.shape, matrix.cols)


__all__ = [
    "FORMATS",
    "GROUP_FORMATS",
    "NESTED",
    "PANEL_ROWS",
    "QUANT_METHOD",
    "SUPERBLOCKS",
    "TILE_COLS",
    "TILE_ROWS",
    "VIEWS",
    "WEIGHED",
    "ColumnOrder",
    "GroupFormat",
    "PackedMatrix",
    "PackedStack",
    "PackedWeight",
    "Packer",
    "WeightFormat",
    "WholeGroups",
    "get_format",
    "pack",
    "reference_packer",
    "take_rows",
    "unpack",
]
