"""torchao: int4, int8 and FP8 weights in plain layouts, as Transformers saves them in safetensors files.

The metadata of a file describes each tensor subclass as a JSON object: under "x.weight", `_type` and `_data` with its
attributes. Its parts are the tensors `x._weight_qdata`, `x._weight_scale` and others. Of a matrix [N, K] with G groups,

| `_type` | `qdata` | `scale` | `zero_point` | W |
|---|---|---|---|---|
| Int8Tensor, IntxUnpackedToInt8Tensor | I8 [N, K] | [N, G] | I8 [N, G] or absent | scale * (code - zero) |
| Int4Tensor | I8 or U8 [N, K / 2], the first code in the low bits | [G, N] | float [G, N] | scale * code + zero |
| Float8Tensor | F8_E4M3 [N, K] | [N, 1] or one | | scale * code |

Codes of Int4Tensor are in two's complement. Types whose layout is made for one kind of GPU are refused. Source: torchao 0.18
(`prototype/safetensors/`, `quantization/quantize_/workflows/`) and FBGEMM (`int4_row_quantize_zp`, `pack_int4`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import CheckpointError, UnsupportedModelError, shown
from ...quant.codes import q4_1_blocks
from ..base import TensorInfo
from ..files import parse_json
from .affine import group_label
from .fp8 import E4M3, Fp8Matrix
from .integers import IntegerMatrix, IntegerTensors, groups_of
from .matrix import Kept, QuantizedMatrix, StoredRows
from .section import Section
from .tensors import SCALES, StoredTensors, check_shape, wrong

_TYPES = ("Int4Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
_FIELDS = ("quant_type", "quant_type_kwargs", "include_input_output_embeddings", "untie_embedding_weights")


def find_torchao(section: Section, tensors: StoredTensors) -> dict[str, QuantizedMatrix]:
    """The quantized matrices of a checkpoint, by the name of their weight."""
    section.check_known(_FIELDS)
    metadata = tensors.metadata()
    found: dict[str, QuantizedMatrix] = {}
    for layer in tensors.names("._weight_qdata"):
        info = tensors.left[f"{layer}._weight_qdata"]
        kind, data = _description(metadata.get(f"{layer}.weight"), info)
        if f"{layer}._weight_act_pre_scale" in tensors.left:
            raise UnsupportedModelError(f"{info.file}, tensor {info.name!r}: its input is scaled first; use the original model")
        make = {"Int4Tensor": _int4, "Float8Tensor": _float8}.get(kind, _integers)
        found[f"{layer}.weight"] = make(f"{layer}._weight", data, tensors)
    return found


def _description(text: str | None, info: TensorInfo) -> tuple[str, Mapping[str, Any]]:
    """Type and attributes of a tensor subclass."""
    if text is None:
        raise CheckpointError("is not described in the metadata; download the file again", file=info.file, tensor=info.name)
    value = parse_json(text.encode(), info.file, f"the metadata of tensor {info.name!r}")
    kind, data = value.get("_type"), value.get("_data")
    if kind not in _TYPES or not isinstance(data, dict):
        problem = f"is torchao's {shown(kind)} (supported: {', '.join(_TYPES)})"
        raise UnsupportedModelError(
            f"{info.file}, tensor {info.name!r}: {problem}; save the model in one of these layouts, or use the original model"
        )
    return kind, data


def _integers(prefix: str, data: Mapping[str, Any], tensors: StoredTensors) -> QuantizedMatrix:
    weight = tensors.take(f"{prefix}_qdata", ("I8",), 2)
    scales = tensors.take(f"{prefix}_scale", SCALES, owner=weight)
    zeros = tensors.optional(f"{prefix}_zero_point", ("I8",))
    rows, cols = weight.shape
    target = data.get("target_dtype")
    match = re.fullmatch(r"int([1-8])", str(target.get("_data"))) if isinstance(target, dict) else None
    bits = int(match[1]) if match else 8
    symmetric = zeros is None or not bool(tensors.read(zeros).any())
    size = cols // groups_of(scales, rows, cols)
    return IntegerMatrix(IntegerTensors(weight, scales, zeros), bits, size, (rows, cols), tensors, "torchao", symmetric)


def _float8(prefix: str, data: Mapping[str, Any], tensors: StoredTensors) -> QuantizedMatrix:
    weight = tensors.take(f"{prefix}_qdata", (E4M3,), 2)
    return Fp8Matrix(weight, tensors.take(f"{prefix}_scale", SCALES, owner=weight), None, tensors)


def _int4(prefix: str, data: Mapping[str, Any], tensors: StoredTensors) -> QuantizedMatrix:
    weight = tensors.take(f"{prefix}_qdata", ("I8", "U8"), 2)
    scales = tensors.take(f"{prefix}_scale", SCALES, 2, owner=weight)
    zeros = tensors.take(f"{prefix}_zero_point", SCALES, 2, owner=weight)
    return Int4Matrix(weight, scales, zeros, tensors)


class Int4Matrix(QuantizedMatrix):
    """A matrix of Int4Tensor, of its stored tensors."""

    lossless, natural = None, "q4_1"

    def __init__(self, weight: TensorInfo, scales: TensorInfo, zeros: TensorInfo, tensors: StoredTensors) -> None:
        rows, cols = weight.shape[0], 2 * weight.shape[1]
        groups = scales.shape[0]
        if cols % groups:
            raise wrong(scales, f"has shape {scales.shape}; {cols} columns cannot be in {groups} equal groups")
        self._size = cols // groups
        label = f"torchao 4-bit, {group_label(self._size, cols)}"
        check_shape(scales, (groups, rows), f"{label}, {rows} x {cols},")
        check_shape(zeros, scales.shape, f"{label}, {rows} x {cols},")
        self._weight, self._scales, self._zeros, self._tensors = weight, scales, zeros, tensors
        super().__init__(label, (rows, cols), (weight, scales, zeros))

    def rows(self, begin: int, end: int) -> StoredRows:
        data = self._tensors.rows(self._weight, begin, end).view(torch.uint8)
        codes = torch.stack((data & 15, data >> 4), -1).flatten(1) ^ 8  # two's complement to codes from 0
        scales, zeros = (
            self._tensors.finite(info, self._tensors.columns(info, begin, end)).t().contiguous()
            for info in (self._scales, self._zeros)
        )
        return _Int4Rows(codes, scales, zeros, self._size)


@dataclass(frozen=True)
class _Int4Rows(StoredRows):
    """Codes uint8 [n, K] from 0, scales and zeros float32 [n, G]: W = scale * (code - 8) + zero."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    size: int

    def floats(self) -> torch.Tensor:
        scales, zeros = (values.repeat_interleave(self.size, 1) for values in (self.scales, self.zeros))
        return (self.codes.float() - 8) * scales + zeros

    def kept(self, format: str) -> Kept | None:
        if format != "q4_1" or self.size % 32:
            return None
        minimum = self.zeros - 8 * self.scales
        scale, least = (values.repeat_interleave(self.size // 32, 1) for values in (self.scales, minimum))
        halves = scale.to(torch.float16), least.to(torch.float16)
        if not all(half.isfinite().all() for half in halves):
            return None
        exact = all(bool((half.float() == full).all()) for half, full in zip(halves, (scale, least), strict=True))
        return Kept(q4_1_blocks(self.codes, *halves), exact)
