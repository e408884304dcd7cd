"""fp8: E4M3 with one fp32 scale per block of 128 x 128 weights, as in DeepSeek's own checkpoints.

E4M3 has 4 exponent bits (bias 7), 3 mantissa bits, subnormals down to 2^-9, 448 as its largest value, no infinities, and NaN
at 0x7f and 0xff. The scale stored here is the `weight_scale_inv` of a published checkpoint.

Sources: DeepSeek-V3 technical report, section 3.3.2 (fine-grained quantization); Micikevicius et al., "FP8 Formats for Deep
Learning" (2022).
"""

from __future__ import annotations

from typing import ClassVar

import torch

from .base import TILE_COLS, TILE_ROWS
from .tiles import check_matrix, check_tiles, empty_tiles, pad_to_tiles, panels

BLOCK = 128  # rows and columns that share a scale
LARGEST = 448.0
_CODES, _NAN = TILE_ROWS * TILE_COLS, 0x7F
_DOWN, _ACROSS = BLOCK // TILE_ROWS, BLOCK // TILE_COLS  # tiles per block, vertically and horizontally


class Fp8:
    """544 bytes per tile: E4M3 [8 k/4][16 r][4], the block's fp32 scale, zeros. W = scale * value, scale = max|W| / 448.

    The four bytes are columns 0, 2, 1, 3 of four: the low bytes of two 16-bit words are a pair of neighbors, and so are the
    high bytes.
    """

    name: ClassVar[str] = "fp8"
    code: ClassVar[int] = 5
    tile_bytes: ClassVar[int] = 544
    bits: ClassVar[float] = 8.5
    activation: ClassVar[str] = "bf16"

    @staticmethod
    def pack(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """float [N, K] -> uint8 [ceil(N/16), ceil(K/32), 544]. A block with a NaN or infinity gets scale NaN and zero codes."""
        check_matrix(weight)
        out = empty_tiles(weight.shape[0], weight.shape[1], Fp8.tile_bytes)
        for begin, end in panels(*weight.shape):
            codes, scale = quantize(weight[begin:end].detach())
            _write(out[begin // TILE_ROWS : -(-end // TILE_ROWS)], codes, scale)
        return out

    @staticmethod
    def unpack(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 tiles -> float [rows, cols]: value times scale, rounded once, in float32."""
        check_tiles(packed, rows, cols)
        out = torch.empty(rows, cols, dtype=dtype, device=packed.device)
        for begin, end in panels(rows, cols):
            tiles = packed[begin // TILE_ROWS : -(-end // TILE_ROWS)].contiguous()
            values = _by_rows(tiles[..., :_CODES]).view(torch.float8_e4m3fn).float()
            scale = tiles.view(torch.float32)[..., _CODES // 4]
            values = values.unflatten(0, (-1, TILE_ROWS)).unflatten(-1, (-1, TILE_COLS)) * scale[:, None, :, None]
            out[begin:end] = values.flatten(2).flatten(0, 1)[: end - begin, :cols]
        return out

    @staticmethod
    def error_bound(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Half a unit in the last place of 4 significant bits, or of E4M3's subnormals, plus the scale's rounding error."""
        w = weight.float()
        scale = expand(block_maxima(w) / LARGEST, *w.shape)
        rounding = w.abs() * 2.0**-22 + LARGEST * 2.0**-150  # of the scale: relative; absolute if it is subnormal
        return torch.maximum(w.abs() * 2.0**-4, scale * 2.0**-10) + rounding


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes float [N, K] to float8_e4m3fn [N, K] and float32 scales [ceil(N/128), ceil(K/128)]; blocks begin at (0, 0)."""
    w = weight.float()
    scale = block_maxima(w) / LARGEST
    scale.masked_fill_(~scale.isfinite(), torch.nan)
    each = expand(scale, *w.shape)
    values = (w / each).masked_fill_((each == 0) | each.isnan(), 0.0).clamp_(-LARGEST, LARGEST)
    return values.to(torch.float8_e4m3fn), scale


def repack(codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Packs a matrix that is already E4M3 in blocks, without rounding. A block with a NaN gets scale NaN.

    Args:
        codes: float8_e4m3fn [N, K].
        scale: float32 [ceil(N/128), ceil(K/128)].

    Returns: uint8 tiles [ceil(N/16), ceil(K/32), 544].

    Raises:
        ValueError: the codes or the scale have another dtype or shape.
    """
    scale = check_scale(codes, scale)
    out = empty_tiles(codes.shape[0], codes.shape[1], Fp8.tile_bytes)
    for begin, end in panels(*codes.shape):
        _write(out[begin // TILE_ROWS : -(-end // TILE_ROWS)], codes[begin:end], scale[begin // BLOCK : -(-end // BLOCK)])
    return out


def dequantize(codes: torch.Tensor, scale: torch.Tensor, first_row: int = 0) -> torch.Tensor:
    """Dequantizes float8_e4m3fn [n, K], the rows from `first_row` of a matrix with these scales, to float32 [n, K]."""
    return codes.float() * expand(scale.float(), codes.shape[0], codes.shape[1], first_row)


def scale_shape(rows: int, cols: int) -> tuple[int, int]:
    """Shape of the scales of a rows x cols matrix."""
    return -(-rows // BLOCK), -(-cols // BLOCK)


def check_scale(codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Returns `scale` if it has the dtype and shape that these codes need, and raises ValueError otherwise."""
    if codes.dim() != 2 or codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"codes must be a float8_e4m3fn matrix, not {codes.dtype} {tuple(codes.shape)}")
    wanted = scale_shape(*codes.shape)
    if scale is None or scale.dtype != torch.float32 or tuple(scale.shape) != wanted:
        given = None if scale is None else f"{scale.dtype} {tuple(scale.shape)}"
        raise ValueError(f"scale must be float32 {list(wanted)} for {tuple(codes.shape)} codes, not {given}")
    return scale


def check_target(format: str) -> None:
    """ValueError unless E4M3 codes can be stored in this format unchanged."""
    if format != Fp8.name:
        raise ValueError(f"E4M3 weights can only be packed as {Fp8.name}, not {format}; dequantize them first")


def has_nan(codes: torch.Tensor) -> bool:
    """Whether any of the codes (uint8, any shape) is NaN."""
    return bool((codes.numpy() & 0x7F == _NAN).any())  # in numpy for the reason given in `largest_magnitude`


def block_maxima(weight: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each block, [N, K] -> [ceil(N/128), ceil(K/128)]; NaN if the block contains one."""
    down, across = scale_shape(*weight.shape)
    padded = torch.nn.functional.pad(weight.abs(), (0, across * BLOCK - weight.shape[1], 0, down * BLOCK - weight.shape[0]))
    return padded.view(down, BLOCK, across, BLOCK).amax((1, 3))


def expand(scale: torch.Tensor, rows: int, cols: int, first_row: int = 0) -> torch.Tensor:
    """The scale of each weight in `rows` rows from `first_row`: [ceil(N/128), ceil(K/128)] -> [rows, K]."""
    blocks = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=scale.device) // BLOCK
    return scale[blocks].repeat_interleave(BLOCK, 1)[:, :cols]


def _write(out: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """Writes float8 [n, K] and the scales of its blocks to the tiles `out`, uint8 [ceil(n/16), ceil(K/32), 544]."""
    down, across, _ = out.shape
    codes = pad_to_tiles(codes.view(torch.uint8))
    broken = block_maxima((codes & 0x7F == _NAN).to(torch.uint8)).bool()
    scale = scale.masked_fill(broken, torch.nan)
    fours = codes.view(down, TILE_ROWS, across, TILE_COLS // 4, 2, 2).permute(0, 2, 3, 1, 5, 4)
    out[..., :_CODES].view(down, across, TILE_COLS // 4, TILE_ROWS, 2, 2).copy_(fours)
    out[..., _CODES:] = 0
    tiles_scale = scale.repeat_interleave(_DOWN, 0)[:down].repeat_interleave(_ACROSS, 1)[:, :across]
    out.view(torch.float32)[..., _CODES // 4] = tiles_scale


def _by_rows(codes: torch.Tensor) -> torch.Tensor:
    """The codes of tiles in row order, uint8 [t, g, 512] -> [16t, 32g]."""
    down, across, _ = codes.shape
    fours = codes.reshape(down, across, TILE_COLS // 4, TILE_ROWS, 2, 2)
    return fours.permute(0, 3, 1, 2, 5, 4).reshape(down * TILE_ROWS, across * TILE_COLS)
