"""MXFP4 as gpt-oss stores its experts: E2M1 values with a power of two as the scale of each 32.

Of a stack [E, N, K], a checkpoint stores `x_blocks` U8 [E, N, K / 32, 16], two codes per byte with the first in the low bits,
and `x_scales` U8 [E, N, K / 32], exponents with a bias of 127 (E8M0; 255 is NaN). It is presented as `x` [E, N, K]. The rows of
gate and up alternate in the file's `gate_up_proj`; here, an expert's rows of gate come first, as in other families. DeepSeek-V4
stores a matrix for each expert, I8 [N, K / 2] and E8M0 [N, K / 32], see `fp8.py`.

Weight format mxfp4 holds codes and exponents as they are. Doubled, the values 0, 0.5, 1, 1.5, 2, 3, 4 and 6 are integers, so
that int8 holds them exactly too if the scales are float16 values. Source: OCP Microscaling Formats (MX) specification 1.0,
sections 5.2 and 5.3; Transformers (`integrations/mxfp4.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...errors import CheckpointError
from ...quant.base import TILE_COLS
from ...quant.codes import mxfp4_blocks
from ..base import TensorInfo
from ..stacks import is_stack, matrices_per_expert
from .affine import AffineRows
from .matrix import Kept, QuantizedMatrix, StoredRows
from .section import Section
from .tensors import StoredTensors, check_shape, wrong

_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the value of each code
_BIAS, _NAN, _BYTES = 127, 255, TILE_COLS // 2


def find_mxfp4(section: Section, tensors: StoredTensors) -> dict[str, QuantizedMatrix]:
    """The MXFP4 stacks of a checkpoint, by the name of their parameter."""
    section.check_known(())
    found: dict[str, QuantizedMatrix] = {}
    for name in tensors.names("_blocks"):
        blocks = tensors.take(f"{name}_blocks", ("U8",), 4)
        scales = tensors.take(f"{name}_scales", ("U8",), 3, owner=blocks)
        check_shape(blocks, (*scales.shape, _BYTES), f"MXFP4 with scales of shape {scales.shape}")
        found[name] = Mxfp4Stack(blocks, scales, tensors, matrices_per_expert(name) if is_stack(name) else 1)
    return found


@dataclass(frozen=True)
class Mxfp4Rows(StoredRows):
    """n rows of a matrix.

    Attributes:
        codes: uint8 [n, K], E2M1 values.
        exponents: uint8 [n, K / 32], none of them NaN.
    """

    codes: torch.Tensor
    exponents: torch.Tensor

    def floats(self) -> torch.Tensor:
        return self._doubled().floats()

    def kept(self, format: str) -> Kept | None:
        if format == "mxfp4":
            return Kept(mxfp4_blocks(self.codes, self.exponents), exact=True)
        return self._doubled().kept(format)

    def _doubled(self) -> AffineRows:
        codes = torch.tensor(_TWICE, dtype=torch.int8, device="cpu")[self.codes.long()]
        return AffineRows(codes, torch.pow(2.0, self.exponents.double() - _BIAS - 1).float(), None, 0, TILE_COLS)


class Mxfp4Matrix(QuantizedMatrix):
    """A matrix.

    Args:
        codes: I8 [N, K / 2].
        scales: F8_E8M0 or U8 [N, K / 32].
        tensors: reads them.

    Raises:
        CheckpointError: the shapes do not fit.
    """

    lossless, natural = "mxfp4", "mxfp4"

    def __init__(self, codes: TensorInfo, scales: TensorInfo, tensors: StoredTensors) -> None:
        rows, half = codes.shape
        if half % _BYTES:
            raise wrong(codes, f"has shape {codes.shape}, but FP4 has scales for each {TILE_COLS} columns")
        check_shape(scales, (rows, half // _BYTES), f"the scales of FP4 codes of shape {codes.shape}")
        self._codes, self._scales, self._tensors = codes, scales, tensors
        super().__init__("MXFP4", (rows, 2 * half), (codes, scales))

    def rows(self, begin: int, end: int) -> StoredRows:
        exponents = self._tensors.rows(self._scales, begin, end).view(torch.uint8)
        _check_exponents(exponents, self._scales)
        data = self._tensors.rows(self._codes, begin, end).view(torch.uint8)
        return Mxfp4Rows(torch.stack((data & 15, data >> 4), -1).flatten(1), exponents)


def _check_exponents(exponents: torch.Tensor, scales: TensorInfo) -> None:
    if bool((exponents == _NAN).any()):
        raise CheckpointError("contains a scale that is NaN; download the file again", file=scales.file, tensor=scales.name)


class Mxfp4Stack(QuantizedMatrix):
    """A stack of matrices, of its blocks and scales. `alternating`: number of matrices whose rows alternate in the file."""

    lossless, natural = "mxfp4", "mxfp4"

    def __init__(self, blocks: TensorInfo, scales: TensorInfo, tensors: StoredTensors, alternating: int) -> None:
        experts, rows, groups = scales.shape
        if rows % alternating:
            raise wrong(scales, f"has shape {scales.shape}, but {alternating} matrices share its {rows} rows")
        self._blocks, self._scales, self._tensors, self._alternating = blocks, scales, tensors, alternating
        super().__init__("MXFP4", (experts, rows, groups * TILE_COLS), (blocks, scales))

    def rows(self, begin: int, end: int) -> StoredRows:
        parts = [self._read(*span) for span in self._spans(begin, end)]
        codes, exponents = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Mxfp4Rows(codes, exponents)

    def _spans(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """(first row in the file, number of rows, which are `alternating` apart), one span per matrix."""
        size = self._scales.shape[1] // self._alternating
        while begin < end:
            matrix, row = divmod(begin, size)
            expert, place = divmod(matrix, self._alternating)
            count = min(end - begin, size - row)
            yield (expert * size + row) * self._alternating + place, count
            begin += count

    def _read(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and exponents of a span."""
        groups, step = self._scales.shape[-1], self._alternating
        last = first + (count - 1) * step + 1
        exponents = self._tensors.rows(self._scales, first, last)[::step]
        _check_exponents(exponents, self._scales)
        data = self._tensors.rows(self._blocks, first * groups, last * groups).view(last - first, -1)[::step]
        return torch.stack((data & 15, data >> 4), -1).view(count, groups * TILE_COLS), exponents
