"""Rows of ggml blocks built from integer codes, so that a `Packer` stores codes of other quantizers unchanged.

int4, q4_1, int8 and mxfp4 represent the same values as ggml's Q4_0, Q4_1, Q8_0 and MXFP4 (`ggml.py`). Columns are padded to
whole blocks of 32 with codes that unpack as zero (int4, int8) or as the minimum (q4_1), which is what `pack` of these formats
does.
"""

from __future__ import annotations

import torch

from .base import TILE_COLS


def int4_blocks(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Q4_0 blocks of W = scale * code.

    Args:
        codes: integers [N, K] from -8 to 7.
        scale: float16 [N, ceil(K/32)].

    Returns: uint8 [N, 18 ceil(K/32)].
    """
    return _blocks((scale,), _nibbles(_padded((codes + 8).to(torch.uint8), 8)))


def q4_1_blocks(codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """Q4_1 blocks of W = scale * code + minimum.

    Args:
        codes: integers [N, K] from 0 to 15.
        scale, minimum: float16 [N, ceil(K/32)].

    Returns: uint8 [N, 20 ceil(K/32)].
    """
    return _blocks((scale, minimum), _nibbles(_padded(codes.to(torch.uint8), 0)))


def int8_blocks(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Q8_0 blocks of W = scale * code.

    Args:
        codes: integers [N, K] from -128 to 127.
        scale: float16 [N, ceil(K/32)].

    Returns: uint8 [N, 34 ceil(K/32)].
    """
    return _blocks((scale,), _padded(codes.to(torch.int8), 0).view(torch.uint8))


def mxfp4_blocks(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """MXFP4 blocks.

    Args:
        codes: uint8 [N, K], E2M1 values; K is a multiple of 32.
        exponents: uint8 [N, K/32], E8M0.

    Returns: uint8 [N, 17 K/32].
    """
    return torch.cat((exponents[..., None], _nibbles(codes.unflatten(1, (-1, TILE_COLS)))), -1).flatten(1)


def _padded(codes: torch.Tensor, value: int) -> torch.Tensor:
    """[N, K] -> contiguous [N, ceil(K/32), 32]."""
    missing = -codes.shape[1] % TILE_COLS
    padded = torch.nn.functional.pad(codes, (0, missing), value=value) if missing else codes.contiguous()
    return padded.view(codes.shape[0], -1, TILE_COLS)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [N, g, 32] -> [N, g, 16]: columns 0..15 in the low nibbles, 16..31 in the high ones."""
    return codes[..., :16] | (codes[..., 16:] << 4)


def _blocks(halves: tuple[torch.Tensor, ...], body: torch.Tensor) -> torch.Tensor:
    """Blocks of float16 values followed by the codes, as rows of bytes."""
    heads = [half.contiguous().unsqueeze(-1).view(torch.uint8) for half in halves]
    return torch.cat((*heads, body), -1).flatten(1)
