"""Packed checkpoints, which are written once and then mapped.

A directory with config.json and model.safetensors. A packed matrix lies under the parameter's own name as uint8
[ceil(rows/16), ceil(cols/32), tile_bytes], the tiles of `native/include/dso.h`, and a stack of experts' matrices as
[count, ceil(rows/16), ceil(cols/32), tile_bytes]; everything else is an ordinary float tensor. config.json describes
the tiles:

    "quantization_config": {
        "quant_method": "deepseek_optimizer", "format_version": 1,
        "modules": {
            "model.layers.0.mlp.up_proj": {"format": "int4", "shape": [1536, 576]},
            "model.layers.1.mlp.experts.down_proj": {"format": "int4", "shape": [64, 2048, 1408]}, ...
        },
        ... fields of DeepSeekConfig
    }

A module's matrix is its `.weight`; a stack is named by its parameter, and its shape is count, rows, cols. Files with stacks
have format_version 2, others 1, so that older readers refuse only files that they cannot read. The file is a valid
safetensors file; tensors begin at multiples of 64 bytes where their sizes allow it, matrices first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..errors import CheckpointError, ConfigError
from ..quant import PackedMatrix, PackedStack, PackedWeight, Packer, get_format, reference_packer, unpack
from ..quant.tiles import tile_counts
from .atomic import atomic_directory
from .base import TensorInfo
from .directory import CONFIG, SINGLE, SafetensorsCheckpoint
from .files import DataFile
from .layout import Stored, bytes_of, layout_of
from .stacks import StackShape

QUANT_METHOD = "deepseek_optimizer"
VERSION, VERSION_WITH_STACKS = 1, 2


@dataclass(frozen=True)
class PackedEntry:
    """The entry in config.json for one matrix [rows, cols], or one stack [count, rows, cols]."""

    format: str
    shape: tuple[int, ...]

    @property
    def tiles(self) -> tuple[int, ...]:
        """Shape of the uint8 tensor."""
        *count, rows, cols = self.shape
        return (*count, *tile_counts(rows, cols), get_format(self.format).tile_bytes)

    def promise(self) -> PackedWeight:
        """The weight without data, on the meta device."""
        tiles = torch.empty(self.tiles, dtype=torch.uint8, device="meta")
        if len(self.shape) == 3:
            return PackedStack(self.format, self.shape[0], self.shape[1], self.shape[2], tiles)
        return PackedMatrix(self.format, self.shape[0], self.shape[1], tiles)


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a packed checkpoint."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD and "modules" in quantization


def packed_entries(config: Mapping[str, Any], file: Path) -> dict[str, PackedEntry]:
    """The matrices a packed checkpoint's config names, by parameter name; CheckpointError if the schema is violated."""

    def wrong(what: str, module: str | None = None) -> CheckpointError:
        return CheckpointError(what, file=file, tensor=module)

    quantization = config["quantization_config"]
    version = quantization.get("format_version")
    if version not in (VERSION, VERSION_WITH_STACKS):
        raise wrong(
            f"quantization_config.format_version is {version!r}; {VERSION} and {VERSION_WITH_STACKS} are supported: "
            "update deepseek-optimizer, or convert the original model again"
        )
    dimensions = (2,) if version == VERSION else (2, 3)
    modules = quantization["modules"]
    if not isinstance(modules, dict):
        raise wrong("quantization_config.modules must be an object")
    entries = {}
    for module, entry in modules.items():
        if not isinstance(entry, dict) or entry.keys() != {"format", "shape"}:
            raise wrong("quantization_config.modules must give format and shape, and nothing else", module)
        try:
            get_format(entry["format"])
        except ConfigError as error:
            raise wrong(str(error), module) from error
        shape = entry["shape"]
        whole = isinstance(shape, list) and all(type(n) is int and 0 < n < 1 << 31 for n in shape)
        if not whole or len(shape) not in dimensions:
            many = " or ".join({2: "two", 3: "three"}[n] for n in dimensions)
            raise wrong(f"shape must be {many} whole numbers > 0, not {shape!r}", module)
        entries[module if len(shape) == 3 else f"{module}.weight"] = PackedEntry(entry["format"], tuple(shape))
    return entries


def packed_section(weights: Mapping[str, PackedWeight]) -> dict[str, Any]:
    """The part of quantization_config that describes these matrices and stacks, by parameter name."""
    stacks = [name for name, weight in weights.items() if isinstance(weight, PackedStack)]
    if outside := [name for name in weights if name.endswith(".weight") == (name in stacks)]:
        raise ValueError(f"a packed matrix must be some module's .weight, and a stack must not: {outside[0]!r}")
    modules = {name.removesuffix(".weight"): {"format": w.format, "shape": list(w.shape)} for name, w in weights.items()}
    version = VERSION_WITH_STACKS if stacks else VERSION
    return {"quant_method": QUANT_METHOD, "format_version": version, "modules": modules}


class PackedCheckpoint(SafetensorsCheckpoint):
    """A checkpoint written by this package. Matrices are mapped if there is a `mapper`; the file is never written to."""

    kind: ClassVar[str] = "packed"

    def __init__(self, directory: Path, config: dict[str, Any], files: dict[Path, DataFile], tensors: Mapping[str, TensorInfo]):
        super().__init__(directory, config, files, tensors)
        self._entries = packed_entries(config, directory / CONFIG)
        for name, entry in self._entries.items():
            info = self.info(name)
            if info.dtype != "U8" or info.shape != entry.tiles:
                raise CheckpointError(
                    f"is {info.dtype} {info.shape}; {entry.format} {list(entry.shape)} is U8 {entry.tiles}",
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
        stack = self.packed_stack(name, entry.format, entry.shape)  # type: ignore[arg-type]  # three numbers
        return torch.stack([unpack(stack.matrix(i)) for i in range(stack.count)])

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        return self.read(name).flatten(0, -2)[begin:end] if name in self._entries else super().read_rows(name, begin, end)

    def packed(self, name: str, format: str, packer: Packer = reference_packer) -> PackedMatrix:
        """The matrix as stored; CheckpointError for another format than the stored one."""
        if name not in self._entries:
            return super().packed(name, format, packer)
        rows, cols = self.matrix_shape(name)
        return PackedMatrix(format, rows, cols, self._tiles(name, format))

    def packed_stack(self, name: str, format: str, shape: StackShape, packer: Packer = reference_packer) -> PackedStack:
        """The stack as stored, see `packed`."""
        if name not in self._entries:
            return super().packed_stack(name, format, shape, packer)
        return PackedStack(format, *shape, self._tiles(name, format))

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


def save_packed(
    target: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, PackedWeight | torch.Tensor],
    *,
    quantization: Mapping[str, Any] | None = None,
    extra_files: Iterable[Path] = (),
    overwrite: bool = False,
) -> None:
    """Writes a packed checkpoint atomically (see `atomic_directory`).

    Args:
        target: the directory to make.
        config: the model's config.json, as a dict; its quantization_config is replaced.
        tensors: matrices and plain float tensors by parameter name; tied ones once.
        quantization: fields of DeepSeekConfig to store with the description of the matrices.
        extra_files: further files to copy (tokenizer, generation config).
        overwrite: replace an existing target.
    """
    section = dict(quantization or {}) | packed_section({n: t for n, t in tensors.items() if isinstance(t, PackedWeight)})
    whole = {k: v for k, v in config.items() if k != "auto_map"} | {"quantization_config": section}
    with atomic_directory(target, overwrite) as directory:
        text = json.dumps(whole, indent=2, sort_keys=True, allow_nan=False)
        (directory / CONFIG).write_text(text + "\n", encoding="utf-8")
        write_safetensors(directory / SINGLE, tensors)
        for path in extra_files:
            shutil.copyfile(path, directory / path.name)


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Writes one safetensors file without copying tensors; packed ones start at multiples of 64 bytes."""
    layout = layout_of(tensors)
    with open(path, "wb") as file:
        file.write(layout.header)
        for name in layout.order:
            file.write(bytes_of(tensors[name]))
