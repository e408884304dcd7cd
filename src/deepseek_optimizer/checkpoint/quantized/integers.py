"""Matrices of integer codes in row order, packed or one per byte, with scales and zero points in row order too."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..base import TensorInfo
from .affine import AffineRows, formats_of, group_label
from .matrix import QuantizedMatrix
from .tensors import StoredTensors, wrong
from .words import unpack_words


def groups_of(scales: TensorInfo, rows: int, cols: int) -> int:
    """Number of groups in a row; CheckpointError unless there are scales for each row, in equal groups, or one for all."""
    if math.prod(scales.shape) == 1 or scales.shape == (rows,):
        return 1
    if len(scales.shape) != 2 or scales.shape[0] != rows or scales.shape[1] == 0 or cols % scales.shape[1]:
        raise wrong(scales, f"has shape {scales.shape}; {rows} x {cols} weights need a scale for each group of each row")
    return scales.shape[1]


@dataclass(frozen=True)
class IntegerTensors:
    """The tensors of a matrix. `weight`: I32 if its codes are packed, or I8; `shape`: says what its shape is."""

    weight: TensorInfo
    scales: TensorInfo
    zeros: TensorInfo | None = None
    group_of: TensorInfo | None = None
    shape: TensorInfo | None = None


class IntegerMatrix(QuantizedMatrix):
    """Integer weights, packed in words (`weight` is I32) or one per byte.

    Args:
        stored: the tensors.
        bits: of a code.
        size: columns of a group.
        shape: rows and columns.
        tensors: reads them.
        quantizer: its name, for the label.
        symmetric: whether all zero points are 0; None: if there are none.
    """

    def __init__(
        self,
        stored: IntegerTensors,
        bits: int,
        size: int,
        shape: tuple[int, int],
        tensors: StoredTensors,
        quantizer: str,
        symmetric: bool | None = None,
    ) -> None:
        self._stored, self._bits, self._size, self._tensors = stored, bits, size, tensors
        self._packed = stored.weight.dtype == "I32"
        rows, cols = shape
        self._groups = groups_of(stored.scales, rows, cols)
        if stored.zeros is not None and stored.zeros.dtype == "I8" and stored.zeros.shape != stored.scales.shape:
            raise wrong(stored.zeros, f"has shape {stored.zeros.shape}, but the scales have {stored.scales.shape}")
        whole = self._groups == 1
        ordered = self._group_of() is not None
        label = f"{quantizer} {bits}-bit, {group_label(size, cols)}{', in activation order' if ordered else ''}"
        kept = not ordered and (size % 32 == 0 or whole)
        self.lossless, self.natural = formats_of(bits, stored.zeros is None if symmetric is None else symmetric, kept)
        infos = (stored.weight, stored.scales, stored.zeros, stored.group_of, stored.shape)
        super().__init__(label, shape, tuple(info for info in infos if info is not None))

    def rows(self, begin: int, end: int) -> AffineRows:
        stored, tensors = self._stored, self._tensors
        codes = tensors.rows(stored.weight, begin, end)
        offset = 1 << (self._bits - 1) if self._packed or self._bits < 8 else 0  # q4_1 holds codes from 0
        if self._packed:
            codes = unpack_words(codes, self._bits)[:, : self.shape[1]]
        elif offset:
            codes = codes.to(torch.int16) + offset
        scales = tensors.finite(stored.scales, self._of_rows(stored.scales, begin, end))
        zeros = None if stored.zeros is None else self._zeros(stored.zeros, begin, end) + offset
        return AffineRows(codes, scales, zeros, offset, self._size, self._group_of())

    def _of_rows(self, info: TensorInfo, begin: int, end: int) -> torch.Tensor:
        """The values of rows [begin, end) in each group: [end - begin, G]."""
        if math.prod(info.shape) == 1:
            return self._tensors.read(info).reshape(1, 1).expand(end - begin, 1)
        return self._tensors.elements(info, begin * self._groups, end * self._groups).view(end - begin, self._groups)

    def _zeros(self, info: TensorInfo, begin: int, end: int) -> torch.Tensor:
        """Zero points of signed codes, int16 [end - begin, G]."""
        if info.dtype == "I8":
            return self._of_rows(info, begin, end).to(torch.int16)
        each = 32 // self._bits
        first, last = begin // each, -(-end // each)
        words = self._tensors.rows(info, first, last).t()
        codes = unpack_words(words, self._bits)[:, begin - first * each : end - first * each]
        return codes.t().to(torch.int16) - (1 << (self._bits - 1))

    def _group_of(self) -> torch.Tensor | None:
        return self._tensors.group_of_columns(self._stored.group_of, self._size, self._groups)
