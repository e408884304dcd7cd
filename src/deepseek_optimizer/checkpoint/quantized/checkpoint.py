"""A directory of safetensors files that another quantizer wrote, presented as float weights.

`quantization_config` in config.json names the method. Each of its layers appears as one weight, whatever tensors it is stored
in; other tensors are ordinary float ones, so that lists of ignored modules are not needed. Weights are dequantized panel by
panel while they are packed. Where a weight format can hold the stored codes, they are kept instead (`affine.py`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...errors import CheckpointError
from ...quant import Packer
from ...quant.base import TILE_ROWS
from ..base import TensorInfo
from ..directory import CONFIG, SafetensorsCheckpoint
from ..files import DataFile
from .auto_round import find_auto_round
from .awq import find_awq
from .bitsandbytes import find_bitsandbytes
from .compressed_tensors import find_compressed_tensors
from .fp8 import find_fbgemm_fp8, find_fp8
from .gptq import find_gptq
from .matrix import Kept, QuantizedMatrix
from .mxfp4 import find_mxfp4
from .section import Section
from .tensors import StoredTensors
from .torchao import find_torchao

METHODS: Mapping[str, Callable[[Section, StoredTensors], dict[str, QuantizedMatrix]]] = {
    "auto-round": find_auto_round,
    "awq": find_awq,
    "bitsandbytes": find_bitsandbytes,
    "compressed-tensors": find_compressed_tensors,
    "fbgemm_fp8": find_fbgemm_fp8,
    "fp8": find_fp8,
    "gptq": find_gptq,
    "mxfp4": find_mxfp4,
    "torchao": find_torchao,
}
_LOSSES = ("is exact", "keeps the codes and rounds scales and minima to float16", "rounds them again")
# Scales of activations, and of keys and values: the plan computes its own.
_UNUSED = re.compile(
    r".*\.((input|output|activation|k|v|q|kv|prob_output)_scale|(input|output)_zero_point|input_scale_ub|input_global_scale)"
)


def method_of(config: Mapping[str, Any]) -> str | None:
    """The `quant_method` of a config.json if it is one of `METHODS`."""
    section = config.get("quantization_config")
    if not isinstance(section, dict):
        return None
    method = section.get("quant_method")
    if method is None and (section.get("load_in_4bit") or section.get("load_in_8bit")):
        return "bitsandbytes"  # early releases named no method
    return method if isinstance(method, str) and method in METHODS else None


class QuantizedCheckpoint(SafetensorsCheckpoint):
    """Quantized weights in safetensors files. `config` omits `quantization_config`.

    Attributes:
        method: its `quant_method`.

    Raises:
        UnsupportedModelError: the section has a field that is not known, or a value that is not supported.
        CheckpointError: a tensor is missing, or has a wrong shape or dtype. The error names it.
    """

    kind: ClassVar[str] = "quantized safetensors"

    def __init__(self, directory: Path, config: dict[str, Any], files: dict[Path, DataFile], tensors: Mapping[str, TensorInfo]):
        config = dict(config)
        method, section = method_of(config), config.pop("quantization_config")
        assert method is not None  # what makes a checkpoint one of this class
        self.method: str = method
        self.quantization = section
        stored = StoredTensors(files, tensors)
        self._matrices = METHODS[self.method](Section(section, self.method, directory / CONFIG), stored)
        self._unused = [name for name in stored.left if _UNUSED.fullmatch(name)]
        plain = {name: info for name, info in stored.left.items() if name not in self._unused}
        for name, matrix in self._matrices.items():
            if name in plain:
                raise CheckpointError(
                    "is stored twice, quantized and not; remove one of the two", file=plain[name].file, tensor=name
                )
            first, nbytes = matrix.stored[0], sum(info.nbytes for info in matrix.stored)
            plain[name] = TensorInfo(name, matrix.label, matrix.shape, first.file, first.offset, nbytes)
        super().__init__(directory, config, files, plain)
        self._converted: Counter[tuple[str, str, int]] = Counter()

    def check_dtype(self, name: str) -> None:
        if name not in self._matrices:
            super().check_dtype(name)

    def lossless_format(self, name: str) -> str | None:
        return self._matrices[name].lossless if name in self._matrices else super().lossless_format(name)

    def natural_format(self, name: str) -> str:
        if name in self._matrices:
            return self._matrices[name].natural
        if self.info(name).dtype == "F16":
            return "bf16"  # fp32 would be exact, but twice the size, and the head is read for each token
        return super().natural_format(name)

    def read(self, name: str) -> torch.Tensor:
        if name not in self._matrices:
            return super().read(name)
        shape = self.shape(name)
        return self.read_rows(name, 0, math.prod(shape[:-1])).view(shape)

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        matrix = self._matrices.get(name)
        if matrix is None:
            return super().read_rows(name, begin, end)
        out = torch.empty(end - begin, matrix.shape[-1], dtype=torch.float32, device="cpu")
        for top, bottom, rows in matrix.panels(begin, end):
            out[top:bottom] = rows.floats()
        return out

    def pack_rows(self, name: str, begin: int, end: int, format: str, packer: Packer, out: torch.Tensor) -> None:
        matrix = self._matrices.get(name)
        if matrix is None:
            stored = self.info(name).dtype
            self._converted[stored, format, 2 if (stored, format) == ("F16", "bf16") else 0] += 1
            return super().pack_rows(name, begin, end, format, packer, out)
        loss = 0
        for top, bottom, rows in matrix.panels(begin, end):
            tiles = out[top // TILE_ROWS : -(-bottom // TILE_ROWS)]
            kept = rows.kept(format)
            if kept is None:
                self.pack_checked(name, rows.floats(), format, packer, tiles)
            else:  # the importance of columns, which `packer` may have, is not for codes that are kept
                packer(kept.weight, format, tiles, importance=None, scale=kept.scale)
            loss = max(loss, _loss(kept, format))
        self._converted[matrix.label, format, loss] += 1
        return None

    def ignores(self, name: str) -> bool:
        """A bias of zeros beside a quantized weight: AutoGPTQ wrote one for each layer, whether the model has it or not."""
        weight = name.removesuffix("bias") + "weight"
        return name.endswith(".bias") and weight in self._matrices and not bool(self.read(name).any())

    def conversions(self) -> list[str]:
        return [
            f"{n} {'matrix' if n == 1 else 'matrices'} converted from {label} to {format}, which {_LOSSES[loss]}"
            for (label, format, loss), n in sorted(self._converted.items())
            if loss
        ]

    def remarks(self) -> list[str]:
        if not self._unused:
            return []
        return [f"{len(self._unused)} scales of activations or of the cache are left out: the plan computes its own"]


def _loss(kept: Kept | None, format: str) -> int:
    """What storing rows in a format has cost: an index of `_LOSSES`."""
    if kept is None:
        return 0 if format == "fp32" else 2
    return 0 if kept.exact else 1
