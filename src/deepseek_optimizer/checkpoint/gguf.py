"""A .gguf file as a checkpoint with Transformers' parameter names.

Blocks of Q4_0, Q4_1, Q8_0, Q5_0, Q5_1, MXFP4, the K-quants, IQ4_NL and IQ4_XS are repacked without loss; other quantised types
are dequantised and packed again, which `conversions` reports.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..errors import CheckpointError
from ..quant import Packer, ggml
from ..quant.base import TILE_ROWS
from ..quant.tiles import panels
from .base import PANEL_ELEMENTS, Checkpoint, TensorInfo
from .files import DataFile
from .gguf_config import ROPE_FACTORS, parameter_name, transformers_config, vocabulary_size
from .gguf_deepseek2 import prediction_tensors, split_kv_b
from .gguf_header import GgufArray, GgufHeader, GgufTensor, read_array, read_header
from .gguf_metadata import Metadata
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
            factors = header.tensors.pop(ROPE_FACTORS, None)
            config = transformers_config(header, path, None if factors is None else self._read(factors, ROPE_FACTORS).float())
            self._remarks = _drop_prediction_layers(header, path)
            self._stored: dict[str, GgufTensor] = {parameter_name(t.name): t for t in header.tensors.values()}
            if len(self._stored) != len(header.tensors):
                raise CheckpointError("contains two tensors for one parameter", file=path)
            self._split = split_kv_b(self._stored, config, path) if "kv_lora_rank" in config else {}
        except BaseException:
            self._file.close()
            raise
        tensors = {name: TensorInfo(name, t.type.name, t.shape, path, t.offset, t.nbytes) for name, t in self._stored.items()}
        for name, pair in self._split.items():
            nbytes = pair.keys.nbytes + pair.values.nbytes
            tensors[name] = TensorInfo(name, pair.type_name, pair.shape, path, pair.keys.offset, nbytes)
        super().__init__(path, config, tensors)
        self.vocabulary_size = vocabulary_size(header)
        self._metadata = {key: value for key, value in header.values.items() if key.startswith(("general.", "tokenizer."))}
        self._converted: Counter[tuple[str, str]] = Counter()

    def read(self, name: str) -> torch.Tensor:
        info = self.info(name)
        if len(info.shape) > 1:
            return self.read_rows(name, 0, math.prod(info.shape[:-1])).reshape(info.shape)
        values = self._read(self._stored[name], name)
        heads = self._interleaved_heads(name)
        return values[_halves_first(info.shape[0], heads)] if heads else values

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        if name in self._split:
            return self._split[name].rows(
                begin, end, lambda tensor, *span: self._decode(tensor, name, self._rows(tensor, *span))
            )
        tensor = self._stored[self.info(name).name]
        return self._decode(tensor, name, self._blocks(name, begin, end)).reshape(end - begin, tensor.shape[-1])

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
        stored = self.info(name).dtype
        if name in self._split:  # its groups run along a head's keys, which are not the columns of the parameter
            return _FLOAT_FORMATS.get(stored)
        return _FLOAT_FORMATS.get(stored) or ggml.lossless_format(stored)

    def natural_format(self, name: str) -> str:
        stored = self.info(name).dtype
        if stored in ("F16", "F32") or name in self._split:
            return "bf16"  # fp32 would be exact, but twice the size of F16 and as large as F32
        return self.lossless_format(name) or ("q4_1" if stored in _UP_TO_FOUR_BITS else "int8")

    def pack_rows(self, name: str, begin: int, end: int, format: str, packer: Packer, out: torch.Tensor) -> None:
        stored, cols = self.info(name).dtype, self.shape(name)[-1]
        if ggml.lossless_format(stored) != format or name in self._split:
            if stored not in _FLOAT_FORMATS:
                self._converted[stored, format] += 1
            return super().pack_rows(name, begin, end, format, packer, out)
        for top, bottom in panels(end - begin, cols, PANEL_ELEMENTS):
            blocks = self._blocks(name, begin + top, begin + bottom)
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

    def _blocks(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) in Transformers' order, undecoded: uint8 [rows, bytes of a row]."""
        tensor = self._stored[name]
        heads = self._interleaved_heads(name)
        size = tensor.shape[0] // heads if heads else 1  # rows are permuted within a head only
        first, last = begin // size * size, -(-end // size) * size
        data = self._rows(tensor, first, last)
        if heads:  # in numpy for the reason given in `all_finite`
            order = _halves_first(last - first, (last - first) // size)[begin - first : end - first]
            data = torch.from_numpy(data.numpy()[order.numpy()])
        return data

    def _rows(self, tensor: GgufTensor, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) in file order, uint8 [rows, bytes of a row]; all dimensions but the last count as rows."""
        stride = tensor.nbytes // math.prod(tensor.shape[:-1])
        return self._file.read_tensor(tensor.offset + begin * stride, (end - begin) * stride).view(end - begin, stride)

    def _interleaved_heads(self, name: str) -> int:
        """Number of heads whose rows the file stores in interleaved order: llama's q and k. 0 for all other tensors."""
        if self._config["model_type"] != "llama" or ".self_attn." not in name:
            return 0
        key = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if key is None:
            return 0
        heads: int = self._config[key]
        if self.info(name).shape[0] % (2 * heads):
            raise CheckpointError(
                f"has {self.info(name).shape[0]} rows for {heads} heads; every head must have the same, even number of rows",
                file=self.path,
                tensor=name,
            )
        return heads

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


def _drop_prediction_layers(header: GgufHeader, path: Path) -> list[str]:
    """Removes the tensors of multi-token prediction layers from `header`; returns a remark about it, if there are any."""
    meta = Metadata(header, path)
    names = prediction_tensors(meta) if meta.architecture == "deepseek2" else []
    for name in names:
        del header.tensors[name]
    return [f"{len(names)} tensors for multi-token prediction are left out: GGUF files do not support it"] if names else []


def _halves_first(rows: int, heads: int) -> torch.Tensor:
    """Indices, in the file, of the rows in Transformers' order: for each head, its even rows, then its odd ones.

    llama.cpp rotates adjacent elements (2i, 2i + 1), for which its converter permutes q and k; Transformers rotates halves.
    """
    return torch.arange(rows, dtype=torch.int64, device="cpu").view(heads, -1, 2).transpose(1, 2).reshape(-1)
