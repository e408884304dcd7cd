"""A directory of FP8 weights with one scale per block of 128 x 128, as DeepSeek publishes V3, R1 and V3.2.

config.json has `quantization_config` {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", ...}. The scales
of a matrix `x.weight`, F8_E4M3 [N, K], are in `x.weight_scale_inv` [ceil(N/128), ceil(K/128)], F32 or BF16; a weight is its
code times the scale. Tensors stored in other dtypes (norms, the embedding, the head, routers) are ordinary float tensors;
`modules_to_not_convert` is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..errors import CheckpointError, UnsupportedModelError
from ..quant import Packer
from ..quant.base import TILE_ROWS
from ..quant.fp8 import BLOCK, Fp8, dequantise, has_nan, scale_shape
from ..quant.tiles import panels
from . import base
from .base import TensorInfo
from .directory import CONFIG, SafetensorsCheckpoint
from .files import DataFile

QUANT_METHOD, E4M3, SCALE = "fp8", "F8_E4M3", "_scale_inv"
_SCALE_DTYPES = ("F32", "BF16")
_ORIGINAL = "use the original bf16 model, or convert it to blocks of 128 x 128"


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Whether a config.json belongs to an FP8 checkpoint of any kind."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


class Fp8Checkpoint(SafetensorsCheckpoint):
    """FP8 weights in safetensors files.

    Scales are not among the `tensors`: they belong to their matrices. `config` omits `quantization_config`.

    Raises:
        UnsupportedModelError: a kind of FP8 other than blocks of 128 x 128.
        CheckpointError: a weight without its scales or the reverse, or one with a wrong shape or dtype. The error names the
            tensor.
    """

    kind: ClassVar[str] = "fp8"

    def __init__(self, directory: Path, config: dict[str, Any], files: dict[Path, DataFile], tensors: Mapping[str, TensorInfo]):
        config = dict(config)
        _check_kind(config.pop("quantization_config"), directory / CONFIG)
        self._scales = {name.removesuffix(SCALE): info for name, info in tensors.items() if name.endswith(SCALE)}
        weights = {name: info for name, info in tensors.items() if not name.endswith(SCALE)}
        for name, info in weights.items():
            if info.dtype == E4M3:
                _check_scale(info, self._scales.get(name))
        for name, scale in self._scales.items():
            if name not in weights or weights[name].dtype != E4M3:
                problem = f"is stored as {weights[name].dtype}" if name in weights else "is missing"
                raise CheckpointError(f"is the scale of {name}, which {problem}", file=scale.file, tensor=scale.name)
        super().__init__(directory, config, files, weights)

    def check_dtype(self, name: str) -> None:
        if not self._is_fp8(name):
            super().check_dtype(name)

    def lossless_format(self, name: str) -> str | None:
        return Fp8.name if self._is_fp8(name) else super().lossless_format(name)

    def read(self, name: str) -> torch.Tensor:
        return self.read_rows(name, 0, self.shape(name)[0]) if self._is_fp8(name) else super().read(name)

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        if not self._is_fp8(name):
            return super().read_rows(name, begin, end)
        return dequantise(self._codes(name, begin, end), self._scale(name), begin)

    def pack_rows(self, name: str, begin: int, end: int, format: str, packer: Packer, out: torch.Tensor) -> None:
        if not self._is_fp8(name) or format != Fp8.name or begin % BLOCK:
            return super().pack_rows(name, begin, end, format, packer, out)
        scale = self._scale(name)
        for top, bottom in panels(end - begin, self.shape(name)[1], base.PANEL_ELEMENTS):
            codes = self._codes(name, begin + top, begin + bottom)
            blocks = scale[(begin + top) // BLOCK : -(-(begin + bottom) // BLOCK)]
            packer(codes, format, out[top // TILE_ROWS : -(-bottom // TILE_ROWS)], scale=blocks)
        return None

    def _is_fp8(self, name: str) -> bool:
        return self.info(name).dtype == E4M3

    def _codes(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of a matrix as stored, float8_e4m3fn; CheckpointError if a weight is NaN."""
        info = self.info(name)
        cols = info.shape[1]
        data = self._files[info.file].read_tensor(info.offset + begin * cols, (end - begin) * cols)
        if has_nan(data):
            raise CheckpointError("contains NaN weights; download the file again", file=info.file, tensor=name)
        return data.view(torch.float8_e4m3fn).view(end - begin, cols)

    def _scale(self, name: str) -> torch.Tensor:
        """The scales of a matrix, float32; CheckpointError unless all are finite and greater than zero."""
        info = self._scales[name]
        data = self._files[info.file].read_tensor(info.offset, info.nbytes)
        scale = data.view(self._dtype(info)).view(info.shape).float()
        if not bool(((scale > 0) & scale.isfinite()).all()):
            invalid = scale[~((scale > 0) & scale.isfinite())][0].item()
            raise CheckpointError(
                f"contains an invalid scale, {invalid:g}; download the file again", file=info.file, tensor=info.name
            )
        return scale


def _check_kind(section: Mapping[str, Any], file: Path) -> None:
    """UnsupportedModelError unless weights are E4M3 in blocks of 128 x 128 and activations are scaled dynamically."""
    supported: dict[str, list[Any]] = {
        "weight_block_size": [[BLOCK, BLOCK]],
        "fmt": ["e4m3", None],
        "activation_scheme": ["dynamic", None],
    }
    for field, allowed in supported.items():
        if section.get(field) not in allowed:
            raise UnsupportedModelError(
                f"{file}: quantization_config.{field} is {str(section.get(field))[:50]}; FP8 is supported with {allowed[0]} "
                f"only: {_ORIGINAL}"
            )


def _check_scale(info: TensorInfo, scale: TensorInfo | None) -> None:
    if len(info.shape) != 2 or 0 in info.shape:
        raise CheckpointError(f"is {E4M3} of shape {info.shape}; only matrices can be {E4M3}", file=info.file, tensor=info.name)
    if scale is None:
        raise CheckpointError(
            f"is {E4M3}, but its scales {info.name}{SCALE} are missing; download the files again",
            file=info.file,
            tensor=info.name,
        )
    wanted = scale_shape(*info.shape)
    if scale.shape != wanted or scale.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"is {scale.dtype} of shape {scale.shape}; the scales of {info.name} {info.shape} in blocks of {BLOCK} x {BLOCK} "
            f"must be {' or '.join(_SCALE_DTYPES)} of shape {wanted}",
            file=scale.file,
            tensor=scale.name,
        )
