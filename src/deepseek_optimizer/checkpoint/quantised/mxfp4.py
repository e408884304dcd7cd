"""MXFP4 as gpt-oss stores its experts: E2M1 values with a power of two as the scale of each 32.

Of a stack [E, N, K], a checkpoint stores `x_blocks` U8 [E, N, K / 32, 16], two codes per byte with the first in the low bits,
and `x_scales` U8 [E, N, K / 32], exponents with a bias of 127 (E8M0; 255 is NaN). It is presented as `x` [E, N, K], in the
order of the file's rows. Doubled, the values 0, 0.5, 1, 1.5, 2, 3, 4 and 6 are integers, so that int8 holds them exactly if the
scales are float16 values. Source: OCP Microscaling Formats (MX) specification 1.0, sections 5.2 and 5.3; Transformers
(`integrations/mxfp4.py`).
"""

from __future__ import annotations

import torch

from ...errors import CheckpointError
from ...quant.base import TILE_COLS
from ..base import TensorInfo
from .affine import AffineRows
from .matrix import QuantisedMatrix, StoredRows
from .section import Section
from .tensors import StoredTensors, check_shape

_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the value of each code
_BIAS, _NAN, _BYTES = 127, 255, TILE_COLS // 2


def find_mxfp4(section: Section, tensors: StoredTensors) -> dict[str, QuantisedMatrix]:
    """The MXFP4 stacks of a checkpoint, by the name of their parameter."""
    section.check_known(())
    found: dict[str, QuantisedMatrix] = {}
    for name in tensors.names("_blocks"):
        blocks = tensors.take(f"{name}_blocks", ("U8",), 4)
        scales = tensors.take(f"{name}_scales", ("U8",), 3, owner=blocks)
        check_shape(blocks, (*scales.shape, _BYTES), f"MXFP4 with scales of shape {scales.shape}")
        found[name] = Mxfp4Stack(blocks, scales, tensors)
    return found


class Mxfp4Stack(QuantisedMatrix):
    """A stack of matrices, of its blocks and scales."""

    lossless, natural = "int8", "int8"

    def __init__(self, blocks: TensorInfo, scales: TensorInfo, tensors: StoredTensors) -> None:
        self._blocks, self._scales, self._tensors = blocks, scales, tensors
        experts, rows, groups = scales.shape
        super().__init__("MXFP4", (experts, rows, groups * TILE_COLS), (blocks, scales))

    def rows(self, begin: int, end: int) -> StoredRows:
        groups = self._scales.shape[-1]
        exponents = self._tensors.rows(self._scales, begin, end)
        if bool((exponents == _NAN).any()):
            raise CheckpointError(
                "contains a scale that is NaN; download the file again", file=self._scales.file, tensor=self._scales.name
            )
        data = self._tensors.rows(self._blocks, begin * groups, end * groups)
        places = torch.stack((data & 15, data >> 4), -1).view(end - begin, groups * TILE_COLS)
        codes = torch.tensor(_TWICE, dtype=torch.int8, device="cpu")[places.long()]
        scales = torch.pow(2.0, exponents.double() - _BIAS - 1).float()  # halved, since the codes are doubled
        return AffineRows(codes, scales, None, 0, TILE_COLS)
