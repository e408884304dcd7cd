"""ggml's block types, and lossless repacking of those that correspond to a format of this package.

Q4_0, Q4_1 and Q8_0 represent the same values as int4, q4_1 and int8: groups of 32 along the row with fp16 scales. The K-quants,
IQ4_XS, IQ4_NL, Q5_0, Q5_1 and MXFP4 have formats of their own (`kquants.py`). Repacking moves bits and rounds nothing. Source:
ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .base import TILE_COLS, TILE_ROWS, WeightFormat
from .blocks import BlockFormat
from .ggml_blocks import read_blocks
from .int4 import Int4
from .int8 import Int8
from .kquants import BLOCK_FORMATS
from .q4_1 import Q4_1
from .tiles import empty_tiles, panels, write_tiles


@dataclass(frozen=True)
class GgmlType:
    """A storage type: `block` elements take `block_bytes` bytes. `code`: its number in `enum ggml_type`."""

    code: int
    name: str
    block: int
    block_bytes: int

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` elements, a multiple of the block."""
        return cols // self.block * self.block_bytes

    def fits(self, cols: int) -> bool:
        """Whether a row of `cols` elements consists of whole blocks."""
        return cols % self.block == 0


GGML_TYPES = {
    t.code: t
    for t in (
        GgmlType(0, "F32", 1, 4),
        GgmlType(1, "F16", 1, 2),
        GgmlType(2, "Q4_0", 32, 18),
        GgmlType(3, "Q4_1", 32, 20),
        GgmlType(6, "Q5_0", 32, 22),
        GgmlType(7, "Q5_1", 32, 24),
        GgmlType(8, "Q8_0", 32, 34),
        GgmlType(9, "Q8_1", 32, 40),
        GgmlType(10, "Q2_K", 256, 84),
        GgmlType(11, "Q3_K", 256, 110),
        GgmlType(12, "Q4_K", 256, 144),
        GgmlType(13, "Q5_K", 256, 176),
        GgmlType(14, "Q6_K", 256, 210),
        GgmlType(15, "Q8_K", 256, 292),
        GgmlType(16, "IQ2_XXS", 256, 66),
        GgmlType(17, "IQ2_XS", 256, 74),
        GgmlType(18, "IQ3_XXS", 256, 98),
        GgmlType(19, "IQ1_S", 256, 50),
        GgmlType(20, "IQ4_NL", 32, 18),
        GgmlType(21, "IQ3_S", 256, 110),
        GgmlType(22, "IQ2_S", 256, 82),
        GgmlType(23, "IQ4_XS", 256, 136),
        GgmlType(24, "I8", 1, 1),
        GgmlType(25, "I16", 1, 2),
        GgmlType(26, "I32", 1, 4),
        GgmlType(27, "I64", 1, 8),
        GgmlType(28, "F64", 1, 8),
        GgmlType(29, "IQ1_M", 256, 56),
        GgmlType(30, "BF16", 1, 2),
        GgmlType(34, "TQ1_0", 256, 54),
        GgmlType(35, "TQ2_0", 256, 66),
        GgmlType(39, "MXFP4", 32, 17),
        GgmlType(40, "NVFP4", 64, 36),
        GgmlType(41, "Q1_0", 128, 18),
    )
}

_NIBBLES, _EIGHTS, _TOP_BITS = 0x0F0F0F0F, 0x88888888 - (1 << 32), 0x80808080 - (1 << 32)  # signed 32-bit integers


_NAMED = {kind.name: kind for kind in GGML_TYPES.values()}

# The format that represents a type exactly. Those of `kquants.py` have the names of their types.
_LOSSLESS: dict[str, WeightFormat] = {"Q4_0": Int4(), "Q4_1": Q4_1(), "Q8_0": Int8()}
_LOSSLESS |= {format.name.upper(): format for format in BLOCK_FORMATS}
_ZERO_CODES = {"Q4_0": _EIGHTS, "Q4_1": 0, "Q8_0": _TOP_BITS}
# Where the fp16 numbers are in a block, in bytes.
_HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def lossless_format(ggml_type: str) -> str | None:
    """The format that represents this type exactly, block for block; None if there is none."""
    return _LOSSLESS[ggml_type].name if ggml_type in _LOSSLESS else None


def blocks_for(format: str, row_bytes: int) -> tuple[str, int]:
    """The ggml type that corresponds to this format, and the number of elements in a row of `row_bytes` bytes.

    Raises:
        ValueError: no type corresponds to the format, or the row does not consist of whole blocks.
    """
    for kind in GGML_TYPES.values():
        if lossless_format(kind.name) == format and row_bytes % kind.block_bytes == 0:
            return kind.name, row_bytes // kind.block_bytes * kind.block
    raise ValueError(f"rows of {row_bytes} bytes are not whole blocks of a ggml type that corresponds to {format}")


def block_scales(blocks: torch.Tensor, ggml_type: str, cols: int) -> torch.Tensor:
    """The fp16 numbers of each block, [N, blocks, 1 or 2], for a type that has a lossless format; of MXFP4 the largest value
    that a block can hold, float32, or NaN for a scale that is NaN."""
    whole = blocks.view(blocks.shape[0], cols // _NAMED[ggml_type].block, -1)
    if ggml_type == "MXFP4":
        exponents = whole[..., :1].double()
        return (12 * torch.exp2(exponents - 128)).masked_fill_(exponents == 255, torch.nan).float()
    places = _HALVES.get(ggml_type, (0,))
    return torch.cat([whole[..., at : at + 2] for at in places], -1).view(torch.float16)


def repack(blocks: torch.Tensor, ggml_type: str, cols: int) -> torch.Tensor:
    """Repacks ggml blocks into tiles of `lossless_format(ggml_type)`.

    Args:
        blocks: uint8 [N, bytes of a row], as a GGUF file stores a matrix.
        ggml_type: one that has a lossless format.
        cols: elements in a row, a multiple of the type's block.
    """
    format, n = _LOSSLESS[ggml_type], blocks.shape[0]
    out = empty_tiles(n, cols, format.tile_bytes)
    for begin, end in panels(n, cols):
        tiles = out[begin // TILE_ROWS : -(-end // TILE_ROWS)]
        if isinstance(format, BlockFormat):
            format.write(tiles, read_blocks(blocks[begin:end], ggml_type, _NAMED[ggml_type].block_bytes))
        else:
            _repack_groups(tiles, blocks[begin:end], ggml_type, cols)
    return out


def _repack_groups(tiles: torch.Tensor, blocks: torch.Tensor, ggml_type: str, cols: int) -> None:
    """Repacks Q4_0, Q4_1 and Q8_0, whose blocks are fp16 numbers and then codes."""
    halves = block_scales(blocks, ggml_type, cols).unbind(-1)
    groups = blocks.reshape(blocks.shape[0], cols // TILE_COLS, -1)
    codes = groups[..., 2 * len(halves) :].clone(memory_format=torch.contiguous_format).view(torch.int32)
    codes = codes ^ _TOP_BITS if ggml_type == "Q8_0" else _reorder_nibbles(codes)
    if missing := -blocks.shape[0] % TILE_ROWS:
        codes = torch.cat([codes, codes.new_full((missing, *codes.shape[1:]), _ZERO_CODES[ggml_type])])
        halves = tuple(torch.nn.functional.pad(h, (0, 0, 0, missing)) for h in halves)
    write_tiles(tiles, codes, tuple(h.contiguous() for h in halves))


def _reorder_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Reorders ggml's words [.., 4] (low nibbles: columns 0..15, high: 16..31) for tiles (low: 8j..8j+3, high: 8j+4..8j+7)."""
    first, second = codes[..., 0::2], codes[..., 1::2]
    low = (first & _NIBBLES) | ((second & _NIBBLES) << 4)
    high = ((first >> 4) & _NIBBLES) | (second & ~_NIBBLES)
    return torch.cat((low, high), -1)


def to_float(blocks: torch.Tensor, ggml_type: str, cols: int) -> torch.Tensor:
    """Converts rows of any ggml type, uint8 [N, bytes of a row], to float [N, cols]: F16 and BF16 keep their dtype, others
    become float32.

    Raises:
        ImportError: the `gguf` package is needed and not installed.
        NotImplementedError: that package does not support the type.
        Neither is raised for plain floats and types that have a lossless format.
    """
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(ggml_type)
    if plain is not None:
        return blocks.contiguous().view(plain)
    if ggml_type == "F64":
        return blocks.contiguous().view(torch.float64).float()
    if ggml_type in _LOSSLESS:
        return _LOSSLESS[ggml_type].unpack(repack(blocks, ggml_type, cols), blocks.shape[0], cols)
    from gguf import GGMLQuantizationType, quants  # slow to import, and needed for few files

    if ggml_type not in GGMLQuantizationType.__members__:
        raise NotImplementedError(f"the installed gguf package does not support {ggml_type}")
    with np.errstate(all="ignore"):  # an invalid scale yields NaN, which the caller checks
        return torch.from_numpy(quants.dequantize(blocks.contiguous().numpy(), GGMLQuantizationType[ggml_type]))
