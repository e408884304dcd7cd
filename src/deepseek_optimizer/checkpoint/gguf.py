"""A .gguf file as a checkpoint with Transformers' parameter names.

Blocks of Q4_0, Q4_1, Q8_0, Q5_0, Q5_1, MXFP4, the K-quants, IQ4_NL and IQ4_XS are repacked without loss; other quantized types
are dequantized and packed again, which `conversions` reports.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..errors import CheckpointError
from ..quant import ColumnOrder, Packer, ggml
from ..quant.base import TILE_ROWS
from ..quant.tiles import panels
from .base import PANEL_ELEMENTS, Checkpoint, TensorInfo
from .files import DataFile
from .gguf_config import ROPE_FACTORS, architecture, parameters, prediction_tensors, transformers_config, vocabulary_size
from .gguf_header import GgufArray, GgufTensor, read_array, read_header
from .gguf_metadata import Metadata
from .gguf_sampling import sampling_parameters
from .gguf_tokenizer import build_tokenizer, builds
from .stacks import StackPart, StackShape

_FLOAT_FORMATS = {"F32": "fp32", "F16": "fp32", "BF16": "bf16"}  # lossless
# Converted to q4_1, as the nearest format in size; the ternary types and 8-bit ones to int8.
_UP_TO_FOUR_BITS = {
    "NVFP4", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
}  # fmt: skip


class GgufCheckpoint(Checkpoint):
    """One GGUF file, read with pread."""

    kind: ClassVar[str] = "gguf"

    def __init__(self, path: Path) -> None:
        self._file = DataFile(path)
        try:
            header = read_header(self._file)
            meta = Metadata(header, self._file)
            entry = architecture(meta)
            stored = {name: tensor for name in ROPE_FACTORS if (tensor := header.tensors.pop(name, None)) is not None}
            config = transformers_config(meta, entry, {name: self._read(t, name).float() for name, t in stored.items()})
            self._remarks = _drop_prediction_layers(meta)
            self._parameters = parameters(meta, entry, config)
        except BaseException:
            self._file.close()
            raise
        tensors = {
            name: TensorInfo(name, p.type_name, p.shape, path, p.sources[0].offset, p.nbytes)
            for name, p in self._parameters.items()
        }
        super().__init__(path, config, tensors)
        self.vocabulary_size = vocabulary_size(header)
        self.sampling = sampling_parameters(header.values)
        self._metadata = {key: value for key, value in header.values.items() if key.startswith(("general.", "tokenizer."))}
        self._converted: Counter[tuple[str, str]] = Counter()

    def read(self, name: str) -> torch.Tensor:
        shape = self.info(name).shape
        if len(shape) > 1:
            return self.read_rows(name, 0, math.prod(shape[:-1])).reshape(shape)
        return self._parameters[name].vector(lambda tensor: self._read(tensor, name))

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        parameter = self._parameters[self.info(name).name]
        rows = parameter.floats(begin, end, self._rows, lambda tensor, blocks: self._decode(tensor, name, blocks))
        return rows.reshape(end - begin, parameter.shape[-1])

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        if roles := self._gate_and_up(name):
            return dict.fromkeys(roles, (shape[0] // 2, *shape[1:]))
        return super().stored(name, shape)

    def parts(self, name: str, shape: StackShape) -> list[StackPart]:
        if roles := self._gate_and_up(name):
            return [StackPart(roles[i % 2], i // 2 * shape[1]) for i in range(shape[0])]
        return super().parts(name, shape)

    def _gate_and_up(self, name: str) -> tuple[str, str] | None:
        """Names of the gate and up tensors of a layer's experts, if the file stores them separately."""
        gate, up = (name.replace(".experts.gate_up_proj", f".experts.{role}_proj") for role in ("gate", "up"))
        return (gate, up) if name.endswith(".experts.gate_up_proj") and name not in self.tensors else None

    def lossless_format(self, name: str) -> str | None:
        return _FLOAT_FORMATS.get(self.info(name).dtype) or self._block_format(name)

    def _block_format(self, name: str) -> str | None:
        """The format that has the stored blocks without decoding them, if there is one."""
        parameter = self._parameters[name]
        return None if parameter.type is None else ggml.lossless_format(parameter.type.name)

    def column_order(self, name: str, format: str) -> ColumnOrder | None:
        known = name in self.tensors and self._block_format(name) == format
        return self._parameters[name].stored_order if known else None

    def natural_format(self, name: str) -> str:
        stored = self.info(name).dtype
        if stored in ("F16", "F32"):
            return "bf16"  # fp32 would be exact, but twice the size of F16 and as large as F32
        if self._parameters[name].type is None:
            return self.lossless_format(name) or self._parameters[name].fallback
        return self.lossless_format(name) or ("q4_1" if stored in _UP_TO_FOUR_BITS else "int8")

    def pack_rows(self, name: str, begin: int, end: int, format: str, packer: Packer, out: torch.Tensor) -> None:
        stored, cols = self.info(name).dtype, self.shape(name)[-1]
        parameter = self._parameters[name]
        if self._block_format(name) != format:
            if stored not in _FLOAT_FORMATS:
                self._converted[stored, format] += 1
            return super().pack_rows(name, begin, end, format, packer, out)
        for top, bottom in panels(end - begin, cols, PANEL_ELEMENTS):
            blocks = parameter.blocks(begin + top, begin + bottom, self._rows)
            self.check_finite(name, ggml.block_scales(blocks, stored, cols))
            packer(blocks, format, out[top // TILE_ROWS : -(-bottom // TILE_ROWS)])

    def conversions(self) -> list[str]:
        return [
            f"{n} {'matrix' if n == 1 else 'matrices'} stored as {stored} converted to {format}, which rounds them again"
            for (stored, format), n in sorted(self._converted.items())
        ]

    def tokenizer(self) -> Any:
        """The file's tokenizer if Transformers would build it wrongly, and None otherwise. See `gguf_tokenizer`."""
        if not builds(str(self._metadata["general.architecture"]), self._metadata):
            return None
        return build_tokenizer(self._metadata, self._array, self.path)

    def _array(self, key: str) -> list[Any]:
        value = self._metadata.get(key)
        return read_array(self._file, value) if isinstance(value, GgufArray) else []

    def remarks(self) -> list[str]:
        return self._remarks

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def close(self) -> None:
        self._file.close()

    def _rows(self, tensor: GgufTensor, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) in file order, uint8 [rows, bytes of a row]; all dimensions but the last count as rows."""
        stride = tensor.nbytes // math.prod(tensor.shape[:-1])
        return self._file.read_tensor(tensor.offset + begin * stride, (end - begin) * stride).view(end - begin, stride)

    def _read(self, tensor: GgufTensor, name: str) -> torch.Tensor:
        blocks = self._file.read_tensor(tensor.offset, tensor.nbytes).view(-1, tensor.type.row_bytes(tensor.shape[-1]))
        return self._decode(tensor, name, blocks).reshape(tensor.shape)

    def _decode(self, tensor: GgufTensor, name: str, blocks: torch.Tensor) -> torch.Tensor:
        cols = tensor.shape[-1]
        try:
            return ggml.to_float(blocks.reshape(-1, tensor.type.row_bytes(cols)), tensor.type.name, cols)
        except ImportError as error:
            raise CheckpointError(
                f"is {tensor.type.name}, which needs the gguf package: pip install gguf", file=self._file.path, tensor=name
            ) from error
        except NotImplementedError as error:
            raise CheckpointError(
                f"is {tensor.type.name}, which is not supported ({error}); use a file in another type, such as Q4_K_M or Q8_0",
                file=self._file.path,
                tensor=name,
            ) from error


def _drop_prediction_layers(meta: Metadata) -> list[str]:
    """Removes the tensors of multi-token prediction layers; returns a remark about it, if there are any."""
    names = prediction_tensors(meta)
    for name in names:
        del meta.tensors[name]
    return [f"{len(names)} tensors for multi-token prediction are left out: GGUF files do not support it"] if names else []
