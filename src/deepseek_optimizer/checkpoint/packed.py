"""Packed checkpoints, which are written once and then mapped into memory.

A directory with config.json and safetensors files. A packed matrix is stored under the parameter's own name as uint8
[ceil(rows/16), ceil(cols/32), tile_bytes], the tiles of `native/include/dso.h`, and a stack of experts' matrices as
[count, ceil(rows/16), ceil(cols/32), tile_bytes]; everything else is an ordinary float tensor. config.json has the settings in
`quantization_config` (the fields of DeepSeekConfig, which tell Transformers the method), and a description of the tiles in
`packed_manifest` (see `manifest.py`). The files are valid safetensors files; matrices come first, and tensors begin at
multiples of 64 bytes where their sizes allow it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..errors import CheckpointError
from ..quant import QUANT_METHOD, ColumnOrder, PackedMatrix, PackedStack, Packer, reference_packer, unpack
from ..quant.parts import Span, packed_part, stack_part
from .base import TensorInfo
from .directory import CONFIG, SafetensorsCheckpoint
from .files import DataFile
from .layout import Stored, bytes_of, layout_of
from .manifest import Manifest
from .stacks import StackShape, matrices_per_expert


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json belongs to a packed checkpoint."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


class PackedCheckpoint(SafetensorsCheckpoint):
    """A checkpoint written by this package. Matrices are mapped if there is a `mapper`; the file is never written to."""

    kind: ClassVar[str] = "packed"

    def __init__(self, directory: Path, config: dict[str, Any], files: dict[Path, DataFile], tensors: Mapping[str, TensorInfo]):
        super().__init__(directory, config, files, tensors)
        self.manifest = Manifest.read(config, directory / CONFIG)
        self._entries = self.manifest.weights()
        for name, entry in self._entries.items():
            info = self.info(name)
            if info.dtype != "U8" or info.shape != entry.tiles:
                raise CheckpointError(
                    f"is {info.dtype} {info.shape}; {entry.format} {list(entry.shape)} must be U8 {entry.tiles}",
                    file=info.file,
                    tensor=name,
                )
        for name, info in tensors.items():
            if info.dtype == "U8" and name not in self._entries:
                raise CheckpointError("is packed, but config.json does not describe it", file=info.file, tensor=name)

    def shape(self, name: str) -> tuple[int, ...]:
        entry = self._entries.get(name)
        return entry.shape if entry else super().shape(name)

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {name: shape} if name in self._entries else super().stored(name, shape)

    def check_dtype(self, name: str) -> None:
        if name not in self._entries:
            super().check_dtype(name)

    def lossless_format(self, name: str) -> str | None:
        return self._entries[name].format if name in self._entries else super().lossless_format(name)

    def read(self, name: str) -> torch.Tensor:
        entry = self._entries.get(name)
        if entry is None:
            return super().read(name)
        if len(entry.shape) == 2:
            return unpack(self.packed(name, entry.format))
        stack = self.packed_stack(name, entry.format, entry.shape)  # type: ignore[arg-type]  # three dimensions
        return torch.stack([unpack(stack.matrix(i)) for i in range(stack.count)])

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        return self.read(name).flatten(0, -2)[begin:end] if name in self._entries else super().read_rows(name, begin, end)

    def packed(self, name: str, format: str, packer: Packer = reference_packer) -> PackedMatrix:
        """The matrix as stored; CheckpointError for another format than the stored one."""
        if name not in self._entries:
            return super().packed(name, format, packer)
        rows, cols = self.matrix_shape(name)
        return PackedMatrix(format, rows, cols, self._tiles(name, format), self.column_order(name, format))

    def packed_part(
        self, name: str, format: str, rows: Span | None, cols: Span | None, packer: Packer = reference_packer
    ) -> PackedMatrix:
        """As stored: some rows are mapped, and of columns only their tiles are read."""
        matrix = self.packed(name, format, packer)
        return packed_part(matrix, rows, cols) if matrix.order is None else super().packed_part(name, format, rows, cols)

    def column_order(self, name: str, format: str) -> ColumnOrder | None:
        return self.manifest.column_order(name, format)

    def packed_stack(self, name: str, format: str, shape: StackShape, packer: Packer = reference_packer) -> PackedStack:
        """The stack as stored, see `packed`."""
        if name not in self._entries:
            return super().packed_stack(name, format, shape, packer)
        return PackedStack(format, *shape, self._tiles(name, format))

    def packed_stack_part(
        self,
        name: str,
        format: str,
        shape: StackShape,
        experts: Span | None,
        rows: Span | None,
        cols: Span | None,
        packer: Packer = reference_packer,
    ) -> PackedStack:
        """As stored: some experts are mapped, and of rows and columns only their tiles are read."""
        if name not in self._entries:
            return super().packed_stack_part(name, format, shape, experts, rows, cols, packer)
        each = matrices_per_expert(name)
        matrices = None if experts is None else (each * experts[0], each * experts[1])
        return stack_part(self.packed_stack(name, format, shape, packer), matrices, rows, cols)

    def stack_pieces(
        self, name: str, format: str, shape: StackShape, packer: Packer, piece_bytes: int
    ) -> Iterator[PackedStack]:
        """The stack as stored, in one piece."""
        if name not in self._entries:
            yield from super().stack_pieces(name, format, shape, packer, piece_bytes)
        else:
            yield self.packed_stack(name, format, shape, packer)

    def mappings(self) -> list[Any]:
        return [file.mapping for file in self._files.values() if file.mapping is not None]

    def _tiles(self, name: str, format: str) -> torch.Tensor:
        info, entry = self.info(name), self._entries[name]
        if format != entry.format:
            raise CheckpointError(
                f"is packed as {entry.format}, not {format}: convert the original checkpoint instead",
                file=self.path,
                tensor=name,
            )
        file = self._files[info.file]
        if self.mapper is None:
            return file.read_tensor(info.offset, info.nbytes).view(entry.tiles)
        return file.map_tensor(info.offset, info.nbytes, self.mapper).view(entry.tiles)


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Writes one safetensors file without copying tensors; packed ones start at multiples of 64 bytes."""
    layout = layout_of(tensors)
    with open(path, "wb") as file:
        file.write(layout.header)
        for name in layout.order:
            file.write(bytes_of(tensors[name]))
