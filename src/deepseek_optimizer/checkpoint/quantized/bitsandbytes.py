"""bitsandbytes: nf4, fp4 (codes of a table of 16 values) and int8.

Of a layer [N, K], a checkpoint stores

| kind | tensors |
|---|---|
| 4 bits | `weight`: two codes per byte in row order, the first in the high bits, in a tensor of any dtype; `weight.quant_map` F32 [16]; `weight.absmax` F32, one per block of `blocksize` elements in row order; `weight.quant_state.bitsandbytes__nf4` (or fp4) U8: a JSON object with `shape`, `blocksize` and others |
| double quantization | `weight.absmax` U8, with `weight.nested_absmax` F32, one per `nested_blocksize` of them, `weight.nested_quant_map` F32 [256] and `nested_offset` in the JSON object |
| int8 | `weight` I8 [N, K], `SCB` F32 [N], `weight_format` 0 |

4 bits: W = quant_map[code] * absmax, where nested absmax = nested_quant_map[absmax] * nested_absmax + nested_offset. int8:
W = code * SCB / 127. Source: bitsandbytes (`functional.py`: `QuantState`, `dequantize_4bit`; `nn/modules.py`).
"""  # noqa: E501  # table rows

from __future__ import annotations

from typing import Any

import torch

from ...errors import shown
from ..base import TensorInfo
from ..files import parse_json
from .affine import AffineRows
from .matrix import QuantizedMatrix, StoredRows
from .section import Section
from .tensors import StoredTensors, check_shape, wrong

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_STORAGE = ("U8", "I8", "F16", "BF16", "F32")
_STATE_BYTES = 1 << 16  # a state has about 150 bytes
_FIELDS = (
    "load_in_8bit", "load_in_4bit", "_load_in_8bit", "_load_in_4bit", "llm_int8_threshold", "llm_int8_skip_modules",
    "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_target_parameters",
)  # fmt: skip


def find_bitsandbytes(section: Section, tensors: StoredTensors) -> dict[str, QuantizedMatrix]:
    """The quantized layers of a checkpoint, by the name of their weight."""
    section.check_known(_FIELDS)
    section.one_of("bnb_4bit_quant_type", _KINDS, "nf4")
    found: dict[str, QuantizedMatrix] = {}
    for kind in _KINDS:
        for name in tensors.names(f"{_STATE}{kind}"):
            found[name] = _four_bits(name, kind, tensors)
    for layer in tensors.names(".SCB"):
        found[f"{layer}.weight"] = _int8(layer, tensors)
    return found


def _int8(layer: str, tensors: StoredTensors) -> QuantizedMatrix:
    scales = tensors.take(f"{layer}.SCB", ("F32", "F16", "BF16"))
    weight = tensors.take(f"{layer}.weight", ("I8",), 2, owner=scales)
    check_shape(scales, (weight.shape[0],), f"an int8 matrix {weight.shape}")
    form = tensors.optional(f"{layer}.weight_format", ("U8",))
    if form is not None and int(tensors.read(form)) != 0:
        raise wrong(form, "names a layout of a GPU; only row-major weights (0) are supported")
    return Int8Matrix(weight, scales, tensors)


class Int8Matrix(QuantizedMatrix):
    """An int8 matrix with a scale per row."""

    lossless, natural = None, "int8"  # the scales SCB / 127 are rarely float16 values

    def __init__(self, weight: TensorInfo, scales: TensorInfo, tensors: StoredTensors) -> None:
        self._weight, self._scales, self._tensors = weight, scales, tensors
        super().__init__("bitsandbytes int8", weight.shape, (weight, scales))

    def rows(self, begin: int, end: int) -> StoredRows:
        scales = self._tensors.finite(self._scales, self._tensors.elements(self._scales, begin, end)) / 127
        return AffineRows(self._tensors.rows(self._weight, begin, end), scales[:, None], None, 0, self.shape[1])


def _four_bits(name: str, kind: str, tensors: StoredTensors) -> QuantizedMatrix:
    info = tensors.take(f"{name}{_STATE}{kind}", ("U8",), 1)
    if info.nbytes > _STATE_BYTES:
        raise wrong(info, f"has {info.nbytes} bytes, more than {_STATE_BYTES} for a description")
    state = parse_json(tensors.read(info).numpy().tobytes(), info.file, f"tensor {info.name!r}")
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_size(size) for size in shape):
        raise wrong(info, f"has the shape {shown(shape)}, which is not that of a matrix")
    count, block = shape[0] * shape[1], _size(info, state, "blocksize")
    weight = tensors.take(name, _STORAGE, owner=info)
    if weight.nbytes < -(-count // 2):
        raise wrong(weight, f"has {weight.nbytes} bytes; {shape[0]} x {shape[1]} weights of 4 bits take {-(-count // 2)}")
    table = tensors.take(f"{name}.quant_map", ("F32",), owner=info)
    check_shape(table, (16,), kind)
    maxima = tensors.take(f"{name}.absmax", ("F32", "U8"), owner=info)
    blocks = -(-count // block)
    check_shape(maxima, (blocks,), f"{shape[0]} x {shape[1]} weights in blocks of {block}")
    nested = _nested(name, info, state, blocks, tensors) if maxima.dtype == "U8" else None
    return FourBitMatrix(kind, (shape[0], shape[1]), block, (weight, table, maxima, info), nested, tensors)


def _nested(
    name: str, info: TensorInfo, state: dict[str, Any], blocks: int, tensors: StoredTensors
) -> tuple[TensorInfo, TensorInfo, int, float]:
    """Tables, block size and offset of maxima that are quantized themselves."""
    block = _size(info, state, "nested_blocksize")
    offset: Any = state.get("nested_offset")
    if type(offset) not in (int, float) or not abs(offset) < 1e30:
        raise wrong(info, f"has the nested_offset {shown(offset)}, which is not a number")
    table = tensors.take(f"{name}.nested_quant_map", ("F32",), owner=info)
    check_shape(table, (256,), "a table of 8-bit codes")
    maxima = tensors.take(f"{name}.nested_absmax", ("F32",), owner=info)
    check_shape(maxima, (-(-blocks // block),), f"{blocks} quantized maxima in blocks of {block}")
    return table, maxima, block, float(offset)


def _size(info: TensorInfo, state: dict[str, Any], field: str) -> int:
    value: Any = state.get(field)
    if not _is_size(value):
        raise wrong(info, f"has the {field} {shown(value)}, which is not a number of elements")
    size: int = value
    return size


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


class FourBitMatrix(QuantizedMatrix):
    """A matrix of 4-bit codes of a table.

    Args:
        kind: "nf4" or "fp4".
        shape: rows and columns.
        block: elements that share a maximum.
        stored: weight, table, maxima and description.
        nested: of quantized maxima: table, maxima of maxima, block size, offset.
        tensors: reads them.
    """

    lossless, natural = None, "q4_1"

    def __init__(
        self,
        kind: str,
        shape: tuple[int, int],
        block: int,
        stored: tuple[TensorInfo, ...],
        nested: tuple[TensorInfo, TensorInfo, int, float] | None,
        tensors: StoredTensors,
    ) -> None:
        self._weight, self._table, self._maxima = stored[:3]
        self._block, self._nested, self._tensors = block, nested, tensors
        super().__init__(f"bitsandbytes {kind}", shape, (*stored, *(nested[:2] if nested else ())))

    def rows(self, begin: int, end: int) -> StoredRows:
        cols, tensors = self.shape[1], self._tensors
        first, last = begin * cols, end * cols  # elements
        data = tensors.bytes(self._weight, first // 2, -(-last // 2))
        codes = torch.stack((data >> 4, data & 15), -1).flatten()[first % 2 :][: last - first]
        table = tensors.finite(self._table, tensors.read(self._table))
        start = first // self._block
        maxima = self._maxima_of(start, -(-last // self._block))
        place = torch.arange(first, last, dtype=torch.int64, device="cpu") // self._block - start
        return _Floats((table[codes.long()] * maxima[place]).view(end - begin, cols))

    def _maxima_of(self, begin: int, end: int) -> torch.Tensor:
        """Maxima of blocks [begin, end), float32."""
        tensors, values = self._tensors, self._tensors.elements(self._maxima, begin, end)
        if self._nested is None:
            return tensors.finite(self._maxima, values)
        table, outer, block, offset = self._nested
        first = begin // block
        scales = tensors.finite(outer, tensors.elements(outer, first, -(-end // block)))
        place = torch.arange(begin, end, dtype=torch.int64, device="cpu") // block - first
        return tensors.finite(table, tensors.read(table))[values.long()] * scales[place] + offset


class _Floats(StoredRows):
    """Rows that are already dequantized."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def floats(self) -> torch.Tensor:
        return self._values
