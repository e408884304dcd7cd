"""FP8 (E4M3) weights with one scale for each block of weights, as DeepSeek publishes V3, R1 and V3.2, for each row, or for all.

A weight is its code times its scale. The scales of a matrix `x.weight`, F8_E4M3 [N, K], are

| `quant_method` | name | shape |
|---|---|---|
| fp8 | `x.weight_scale_inv` or `x.weight_scale` | `weight_block_size` [b, c]: [ceil(N/b), ceil(K/c)]; none: [N, 1] or [1] |
| fbgemm_fp8 | `x.weight_scale` | [N, 1] |

DeepSeek-V4's scales may be powers of two, F8_E8M0, and its experts FP4: E2M1 codes, two in an I8 of `x.weight` [N, K / 2], with
scales [N, K / 32]; these are matrices of `mxfp4.py`.

Tensors stored in other dtypes (norms, the embedding, the head, routers) are ordinary float tensors. Scales of activations are
not used. The format "fp8" keeps blocks whose sides are multiples of 128, and single scales, as they are.
"""

from __future__ import annotations

import math

import torch

from ...errors import CheckpointError
from ...quant import fp8
from ...quant.fp8 import BLOCK, Fp8
from ..base import TensorInfo
from .matrix import Kept, QuantizedMatrix, StoredRows
from .mxfp4 import Mxfp4Matrix
from .section import Section
from .tensors import StoredTensors

E4M3 = "F8_E4M3"
_SCALES = ("_scale_inv", "_scale")  # suffixes of a weight's name
_SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")
_FIELDS = (
    "fmt", "activation_scheme", "weight_block_size", "ignored_layers", "ignored_modules", "kv_cache_scheme",
    "kv_cache_quant_method", "scale_fmt", "modules_to_convert", "expert_dtype",
)  # fmt: skip


def find_fp8(section: Section, tensors: StoredTensors) -> dict[str, QuantizedMatrix]:
    """The FP8 matrices of a checkpoint whose `quant_method` is "fp8"."""
    section.check_known(_FIELDS)
    section.one_of("fmt", ("e4m3",), "e4m3")
    section.one_of("activation_scheme", ("dynamic", "static"), "dynamic")
    section.one_of("expert_dtype", ("fp8", "fp4"), "fp8")
    return _find_fp4(tensors) | _find(tensors, section.block("weight_block_size", section.fields.get("weight_block_size")))


def find_fbgemm_fp8(section: Section, tensors: StoredTensors) -> dict[str, QuantizedMatrix]:
    """The FP8 matrices of a checkpoint whose `quant_method` is "fbgemm_fp8"."""
    section.check_known(("activation_scale_ub",))
    return _find(tensors, None)


def _find_fp4(tensors: StoredTensors) -> dict[str, QuantizedMatrix]:
    found: dict[str, QuantizedMatrix] = {}
    for name in [name for name, info in tensors.left.items() if info.dtype == "I8" and name.endswith(".weight")]:
        suffix = next((suffix for suffix in _SCALES if f"{name}{suffix}" in tensors.left), _SCALES[0])
        codes = tensors.take(name, ("I8",), 2)
        found[name] = Mxfp4Matrix(codes, tensors.take(f"{name}{suffix}", ("F8_E8M0", "U8"), 2, owner=codes), tensors)
    return found


def _find(tensors: StoredTensors, block: tuple[int, int] | None) -> dict[str, QuantizedMatrix]:
    found: dict[str, QuantizedMatrix] = {}
    for name in [name for name, info in tensors.left.items() if info.dtype == E4M3]:
        info = tensors.left[name]
        if len(info.shape) != 2 or 0 in info.shape:
            raise CheckpointError(
                f"is {E4M3} of shape {info.shape}; only matrices can be {E4M3}", file=info.file, tensor=info.name
            )
        suffix = next((suffix for suffix in _SCALES if f"{name}{suffix}" in tensors.left), None)
        if suffix is None:
            raise CheckpointError(
                f"is {E4M3}, but its scales {name}{_SCALES[0]} are missing; download the files again",
                file=info.file,
                tensor=name,
            )
        weight = tensors.take(name, (E4M3,))
        found[name] = Fp8Matrix(weight, tensors.left.pop(f"{name}{suffix}"), block, tensors)
    for suffix in _SCALES:
        for name in [name for name in tensors.names(suffix) if name.endswith(".weight")]:
            scale = tensors.left[f"{name}{suffix}"]
            problem = f"is stored as {tensors.left[name].dtype}" if name in tensors.left else "is missing"
            raise CheckpointError(f"is the scale of {name}, which {problem}", file=scale.file, tensor=scale.name)
    return found


class Fp8Matrix(QuantizedMatrix):
    """An E4M3 matrix.

    Args:
        weight: F8_E4M3 [N, K].
        scale: its scales.
        block: rows and columns that share a scale; None: a scale for each row, or one for all.
        tensors: reads them.

    Raises:
        CheckpointError: the scales have a wrong shape or dtype.
    """

    def __init__(self, weight: TensorInfo, scale: TensorInfo, block: tuple[int, int] | None, tensors: StoredTensors) -> None:
        rows, cols = weight.shape
        if block is None:
            per_row = math.prod(scale.shape) != 1
            self._block, wanted = (1 if per_row else rows, cols), f"({rows}, 1), ({rows},) or a single scale"
            fits = not per_row or scale.shape in ((rows, 1), (rows,))
            form = f"the scales of {weight.name} {weight.shape}"
        else:
            self._block, shape = block, (-(-rows // block[0]), -(-cols // block[1]))
            wanted, fits = f"{shape}", scale.shape == shape
            form = f"the scales of {weight.name} {weight.shape} in blocks of {block[0]} x {block[1]}"
        if not fits or scale.dtype not in (*_SCALE_DTYPES, *(() if block else ("F16",))):
            raise CheckpointError(
                f"is {scale.dtype} of shape {scale.shape}; {form} must be {' or '.join(_SCALE_DTYPES)} of shape {wanted}",
                file=scale.file,
                tensor=scale.name,
            )
        self._weight, self._scale, self._tensors = weight, scale, tensors
        single = math.prod(scale.shape) == 1 and block is None
        self._whole_blocks = single or (block is not None and not block[0] % BLOCK and not block[1] % BLOCK)
        self.lossless, self.natural = (Fp8.name, Fp8.name) if self._whole_blocks else (None, "int8")
        kind = f"blocks of {self._block[0]} x {self._block[1]}" if block else "per tensor" if single else "per channel"
        super().__init__(f"FP8 {kind}", (rows, cols), (weight, scale))

    def rows(self, begin: int, end: int) -> StoredRows:
        codes = self._tensors.rows(self._weight, begin, end)
        if fp8.has_nan(codes.view(torch.uint8)):
            raise CheckpointError(
                "contains NaN weights; download the file again", file=self._weight.file, tensor=self._weight.name
            )
        return _Fp8Rows(codes, self._scales(), self._block, begin, self._whole_blocks)

    def _scales(self) -> torch.Tensor:
        """The scales, float32 [ceil(N/b), ceil(K/c)]; CheckpointError unless all are finite and greater than zero."""
        info = self._scale
        scale = self._tensors.read(info).float()
        valid = (scale > 0) & scale.isfinite()
        if not bool(valid.all()):
            raise CheckpointError(
                f"contains an invalid scale, {scale[~valid][0].item():g}; download the file again",
                file=info.file,
                tensor=info.name,
            )
        return scale.reshape(-(-self.shape[0] // self._block[0]), -(-self.shape[1] // self._block[1]))


class _Fp8Rows(StoredRows):
    """Rows from `first` of a matrix, and the scales of all of it."""

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], first: int, whole: bool) -> None:
        self._codes, self._scale, self._block, self._first, self._whole = codes, scale, block, first, whole

    def floats(self) -> torch.Tensor:
        return self._codes.float() * self._scale_of(self._first, self._block, *self._codes.shape)

    def kept(self, format: str) -> Kept | None:
        if format != Fp8.name or not self._whole or self._first % BLOCK:
            return None
        down, across = fp8.scale_shape(*self._codes.shape)
        scale = self._scale_of(self._first // BLOCK, (-(-self._block[0] // BLOCK), -(-self._block[1] // BLOCK)), down, across)
        return Kept(self._codes, True, scale.contiguous())

    def _scale_of(self, first: int, block: tuple[int, int], rows: int, cols: int) -> torch.Tensor:
        """The scale of each of rows x cols elements from row `first` of a matrix with these blocks."""
        down = torch.arange(first, first + rows, dtype=torch.int64, device="cpu") // block[0]
        across = torch.arange(cols, dtype=torch.int64, device="cpu") // block[1]
        return self._scale[down][:, across]
