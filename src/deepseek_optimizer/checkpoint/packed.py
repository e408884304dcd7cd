"""Packed checkpoints: written once, mapped afterwards.

A directory with config.json and model.safetensors. A packed matrix lies under the parameter's own name as uint8
[ceil(rows/16), ceil(cols/32), tile_bytes], the tiles of `native/include/dso.h`; everything else is an ordinary float tensor.
config.json says what the tiles are:

    "quantization_config": {
        "quant_method": "deepseek_optimizer", "format_version": 1,
        "modules": {"model.layers.0.mlp.up_proj": {"format": "int4", "shape": [1536, 576]}, ...},
        ... fields of DeepSeekConfig
    }

A module's matrix is its `.weight`. The file is a valid safetensors file; tensors begin at multiples of 64 bytes where their
sizes allow it, matrices first.
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
from ..quant import PackedMatrix, Packer, get_format, reference_packer, unpack
from ..quant.tiles import tile_counts
from .atomic import atomic_directory
from .base import TensorInfo
from .directory import CONFIG, SINGLE, SafetensorsCheckpoint
from .files import DataFile

QUANT_METHOD, FORMAT_VERSION = "deepseek_optimizer", 1
_ALIGN = 64
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}


@dataclass(frozen=True)
class PackedEntry:
    """What config.json says about one matrix."""

    format: str
    rows: int
    cols: int

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Shape of the uint8 tensor."""
        return (*tile_counts(self.rows, self.cols), get_format(self.format).tile_bytes)


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a packed checkpoint."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD and "modules" in quantization


def packed_entries(config: Mapping[str, Any], file: Path) -> dict[str, PackedEntry]:
    """The matrices a packed checkpoint's config names, by parameter name; CheckpointError if the schema is not kept."""

    def wrong(what: str, module: str | None = None) -> CheckpointError:
        return CheckpointError(what, file=file, tensor=module)

    quantization = config["quantization_config"]
    if quantization.get("format_version") != FORMAT_VERSION:
        raise wrong(f"quantization_config.format_version is {quantization.get('format_version')!r}; {FORMAT_VERSION} is read")
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
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in shape):
            raise wrong(f"shape must be two whole numbers > 0, not {shape!r}", module)
        entries[f"{module}.weight"] = PackedEntry(entry["format"], *shape)
    return entries


def packed_section(matrices: Mapping[str, PackedMatrix]) -> dict[str, Any]:
    """The part of quantization_config that describes these matrices, by parameter name."""
    if outside := [name for name in matrices if not name.endswith(".weight")]:
        raise ValueError(f"a packed matrix must be some module's .weight: {outside[0]!r}")
    modules = {name.removesuffix(".weight"): {"format": m.format, "shape": [m.rows, m.cols]} for name, m in matrices.items()}
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "modules": modules}


class PackedCheckpoint(SafetensorsCheckpoint):
    """A checkpoint this package wrote: matrices come mapped, read-only as far as the file is concerned."""

    kind: ClassVar[str] = "packed"

    def __init__(self, directory: Path, config: dict[str, Any], files: dict[Path, DataFile], tensors: Mapping[str, TensorInfo]):
        super().__init__(directory, config, files, tensors)
        self._entries = packed_entries(config, directory / CONFIG)
        for name, entry in self._entries.items():
            info = self.info(name)
            if info.dtype != "U8" or info.shape != entry.tiles:
                raise CheckpointError(
                    f"is {info.dtype} {info.shape}; {entry.format} [{entry.rows}, {entry.cols}] is U8 {entry.tiles}",
                    file=info.file,
                    tensor=name,
                )
        for name, info in tensors.items():
            if info.dtype == "U8" and name not in self._entries:
                raise CheckpointError("is packed, but config.json does not say how", file=info.file, tensor=name)

    def shape(self, name: str) -> tuple[int, ...]:
        entry = self._entries.get(name)
        return (entry.rows, entry.cols) if entry else super().shape(name)

    def lossless_format(self, name: str) -> str | None:
        return self._entries[name].format if name in self._entries else super().lossless_format(name)

    def read(self, name: str) -> torch.Tensor:
        return unpack(self.packed(name, self._entries[name].format)) if name in self._entries else super().read(name)

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        return self.read(name)[begin:end] if name in self._entries else super().read_rows(name, begin, end)

    def packed(self, name: str, format: str, packer: Packer = reference_packer) -> PackedMatrix:
        """The matrix in place, without a copy; it can't be had in another format than it was packed in."""
        entry = self._entries.get(name)
        if entry is None:
            return super().packed(name, format, packer)
        if format != entry.format:
            raise CheckpointError(
                f"is packed as {entry.format}, not {format}: convert the original checkpoint instead",
                file=self.path,
                tensor=name,
            )
        info = self.info(name)
        data = self._files[info.file].map_tensor(info.offset, info.nbytes).view(entry.tiles)
        return PackedMatrix(entry.format, entry.rows, entry.cols, data)


def save_packed(
    target: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, PackedMatrix | torch.Tensor],
    *,
    quantization: Mapping[str, Any] | None = None,
    extra_files: Iterable[Path] = (),
    overwrite: bool = False,
) -> None:
    """Writes a packed checkpoint: all of it under the final name, or nothing (see `atomic_directory`).

    Args:
        target: the directory to make.
        config: the model's config.json, as a dict; its quantization_config is replaced.
        tensors: matrices and plain float tensors by parameter name; tied ones once.
        quantization: fields of DeepSeekConfig to keep beside the description of the matrices.
        extra_files: files to copy along (tokenizer, generation config).
        overwrite: replace an existing target.
    """
    section = dict(quantization or {}) | packed_section({n: t for n, t in tensors.items() if isinstance(t, PackedMatrix)})
    whole = {k: v for k, v in config.items() if k != "auto_map"} | {"quantization_config": section}
    with atomic_directory(target, overwrite) as directory:
        text = json.dumps(whole, indent=2, sort_keys=True, allow_nan=False)
        (directory / CONFIG).write_text(text + "\n", encoding="utf-8")
        write_safetensors(directory / SINGLE, tensors)
        for path in extra_files:
            shutil.copyfile(path, directory / path.name)


def write_safetensors(path: Path, tensors: Mapping[str, PackedMatrix | torch.Tensor]) -> None:
    """One safetensors file, streamed: no copy of a tensor is made, and the packed ones begin at multiples of 64 bytes."""
    plain = {name: (t.data if isinstance(t, PackedMatrix) else t).detach().cpu().contiguous() for name, t in tensors.items()}
    sizes = {name: t.numel() * t.element_size() for name, t in plain.items()}
    # Holes are not allowed in the format, so sizes that keep the alignment come first; then larger items before smaller.
    order = sorted(plain, key=lambda n: (sizes[n] % _ALIGN != 0, -plain[n].element_size(), n))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        if plain[name].dtype not in _DTYPES:
            raise ValueError(f"{name}: {plain[name].dtype} can't be saved; use one of {', '.join(map(str, _DTYPES))}")
        header[name] = {
            "dtype": _DTYPES[plain[name].dtype],
            "shape": list(plain[name].shape),
            "data_offsets": [at, at + sizes[name]],
        }
        at += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(plain[name].reshape(-1).view(torch.uint8).numpy().data)
