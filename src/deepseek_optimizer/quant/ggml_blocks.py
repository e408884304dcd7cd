"""Reads the blocks of ggml's types: from the bytes of a GGUF file to codes and scales.

Source: ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from .blocks import Blocks

# Of m blocks: codes [m, block], scale [m, ..], then minimum, d [m] and dmin [m], or None where the type has none.
_Read = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def read_blocks(blocks: torch.Tensor, ggml_type: str, block_bytes: int) -> Blocks:
    """The numbers of rows of blocks, uint8 [n, bytes of a row], of one of the types in `READERS`."""
    rows = blocks.shape[0]
    codes, scale, minimum, d, dmin = READERS[ggml_type](blocks.reshape(-1, block_bytes))

    def by_row(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.reshape(rows, -1)

    return Blocks(codes.reshape(rows, -1), scale.reshape(rows, -1), by_row(minimum), by_row(d), by_row(dmin))


def _halves(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """fp16 [m] at this byte of each block."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).squeeze(1)


def _negated(halves: torch.Tensor) -> torch.Tensor:
    """The opposite numbers; NaNs keep their bits but the sign, as in the native code."""
    return (halves.view(torch.int16) ^ -32768).view(torch.float16)


def _fields(x: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` fields of `bits` bits of each byte: uint8 [..., k] -> [..., count, k]."""
    return torch.stack([(x >> (bits * i)) & ((1 << bits) - 1) for i in range(count)], -2)


def _nibbles(x: torch.Tensor, run: int) -> torch.Tensor:
    """4-bit codes: of each `run` bytes first the low nibbles, then the high ones. uint8 [m, k] -> [m, 2k]."""
    return _fields(x.unflatten(1, (-1, run)), 4, 2).flatten(1)


def _pairs(x: torch.Tensor) -> torch.Tensor:
    """2-bit codes of Q2_K and Q3_K: uint8 [m, 64] -> [m, 256]."""
    return _fields(x.unflatten(1, (2, 32)), 2, 4).flatten(1)


def _six_bit_scales(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and minimums of Q4_K and Q5_K: uint8 [m, 12] -> int8 [m, 8] each."""
    scale, minimum, both = x.unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([scale & 63, (both & 15) | ((scale >> 2) & 48)], 1)
    return scales.view(torch.int8), torch.cat([minimum & 63, (both >> 4) | ((minimum >> 2) & 48)], 1).view(torch.int8)


def _q2_k(b: torch.Tensor) -> _Read:
    scales = b[:, :16]
    codes = _pairs(b[:, 16:80])
    return codes, (scales & 15).view(torch.int8), (scales >> 4).view(torch.int8), _halves(b, 80), _negated(_halves(b, 82))


def _q3_k(b: torch.Tensor) -> _Read:
    high = _fields(b[:, :32], 1, 8).flatten(1)
    low, top = _fields(b[:, 96:104], 4, 2).flatten(1), _fields(b[:, 104:108], 2, 4).flatten(1)
    scales = (low | (top << 4)).view(torch.int8) - 32
    return _pairs(b[:, 32:96]) | (high << 2), scales, None, _halves(b, 108), None


def _q4_k(b: torch.Tensor) -> _Read:
    return _nibbles(b[:, 16:], 32), *_six_bit_scales(b[:, 4:16]), _halves(b, 0), _negated(_halves(b, 2))


def _q5_k(b: torch.Tensor) -> _Read:
    codes = _nibbles(b[:, 48:], 32) | (_fields(b[:, 16:48], 1, 8).flatten(1) << 4)
    return codes, *_six_bit_scales(b[:, 4:16]), _halves(b, 0), _negated(_halves(b, 2))


def _q6_k(b: torch.Tensor) -> _Read:
    high = _fields(b[:, 128:192].unflatten(1, (2, 32)), 2, 4).flatten(1)
    return _nibbles(b[:, :128], 64) | (high << 4), b[:, 192:208].contiguous().view(torch.int8), None, _halves(b, 208), None


def _iq4_xs(b: torch.Tensor) -> _Read:
    top = _fields(b[:, 2:4].unsqueeze(-1), 2, 4).flatten(1)
    low = _fields(b[:, 4:8].unsqueeze(-1), 4, 2).flatten(1)
    return _nibbles(b[:, 8:], 16), (low | (top << 4)).view(torch.int8) - 32, None, _halves(b, 0), None


def _iq4_nl(b: torch.Tensor) -> _Read:
    return _nibbles(b[:, 2:], 16), _halves(b, 0), None, None, None


def _mxfp4(b: torch.Tensor) -> _Read:
    return _nibbles(b[:, 1:], 16), b[:, :1], None, None, None


def _fifth_bits(x: torch.Tensor) -> torch.Tensor:
    """Bit 4 of 32 codes: uint8 [m, 4] -> [m, 32]."""
    return _fields(x.unsqueeze(-1), 1, 8).flatten(1) << 4


def _q5_0(b: torch.Tensor) -> _Read:
    return _nibbles(b[:, 6:], 16) | _fifth_bits(b[:, 2:6]), _halves(b, 0), None, None, None


def _q5_1(b: torch.Tensor) -> _Read:
    return _nibbles(b[:, 8:], 16) | _fifth_bits(b[:, 4:8]), _halves(b, 0), _halves(b, 2), None, None


READERS: Mapping[str, Callable[[torch.Tensor], _Read]] = MappingProxyType(
    {
        "Q2_K": _q2_k,
        "Q3_K": _q3_k,
        "Q4_K": _q4_k,
        "Q5_K": _q5_k,
        "Q6_K": _q6_k,
        "IQ4_XS": _iq4_xs,
        "IQ4_NL": _iq4_nl,
        "Q5_0": _q5_0,
        "Q5_1": _q5_1,
        "MXFP4": _mxfp4,
    }
)
