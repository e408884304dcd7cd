"""The manifest of a packed checkpoint: the description of its packed weights in config.json, separate from the settings.

    "packed_manifest": {
        "version": 3,
        "modules": {
            "model.layers.0.mlp.up_proj": {"format": "int4", "shape": [1536, 576]},
            "model.layers.1.mlp.experts.down_proj": {"format": "int4", "shape": [64, 2048, 1408]}, ...
        },
        "curve": [{"bits": 4.9, "bytes": 96123456, "measured_kl": 0.018, "chosen": true, ...}, ...],
        "rounding": {"method": "compensated", "text": "built-in", "tokens": 8192, "matrices": 211, "plain": {}}
    }

A module's matrix is its `.weight`; a stack of experts' matrices has the name of its parameter, and its shape is count, rows,
cols. An entry has "column_order": [groups, each] if its tiles have the columns in a `ColumnOrder`. `curve` lists the choices of
formats that were measured for a `kl_budget`, smallest first; it is empty without one. `rounding` says how the weights were
rounded if that depended on a calibration text; it is empty otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from ..errors import CheckpointError, ConfigError
from ..quant import SUPERBLOCKS, ColumnOrder, PackedMatrix, PackedStack, PackedWeight, get_format
from ..quant.blocks import SUPERBLOCK
from ..quant.tiles import tile_counts

KEY: Final = "packed_manifest"  # in config.json
VERSION: Final = 4  # 1 and 2 had the modules among the settings, in quantization_config
_OTHER_FP8 = 3  # a version that differs only in the order of fp8's codes


@dataclass(frozen=True)
class PackedEntry:
    """One packed matrix [rows, cols], or stack of matrices [count, rows, cols]. `order`: see `PackedMatrix`."""

    format: str
    shape: tuple[int, ...]
    order: ColumnOrder | None = None

    @classmethod
    def of(cls, weight: PackedWeight) -> PackedEntry:
        return cls(weight.format, tuple(weight.shape), weight.order if isinstance(weight, PackedMatrix) else None)

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON types."""
        order = {} if self.order is None else {"column_order": [self.order.groups, self.order.each]}
        return {"format": self.format, "shape": list(self.shape), **order}

    @property
    def tiles(self) -> tuple[int, ...]:
        """Shape of the uint8 tensor that stores it."""
        *count, rows, cols = self.shape
        return (*count, *tile_counts(rows, cols), get_format(self.format).tile_bytes)


@dataclass(frozen=True)
class Manifest:
    """Describes the packed weights of one model or checkpoint. Immutable.

    Attributes:
        modules: format and shape by module name, or by parameter name for a stack of experts.
        curve: sizes and qualities measured to choose the formats; empty if the user chose them.
        rounding: how the weights were rounded on a calibration text; empty: without one.
    """

    modules: Mapping[str, PackedEntry] = field(default_factory=dict)
    curve: tuple[Mapping[str, Any], ...] = ()
    rounding: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", MappingProxyType(dict(self.modules)))
        object.__setattr__(self, "curve", tuple(self.curve))
        object.__setattr__(self, "rounding", MappingProxyType(dict(self.rounding)))

    @classmethod
    def of(
        cls, weights: Mapping[str, Any], curve: Sequence[Mapping[str, Any]] = (), rounding: Mapping[str, Any] | None = None
    ) -> Manifest:
        """The manifest of these weights.

        Args:
            weights: by parameter name; those that are not packed are left out.
            curve, rounding: see the attributes.

        Raises:
            ValueError: a packed matrix that is not a module's `.weight`, or a stack that is.
        """
        packed = {name: weight for name, weight in weights.items() if isinstance(weight, PackedWeight)}
        for name, weight in packed.items():
            if name.endswith(".weight") == isinstance(weight, PackedStack):
                raise ValueError(f"a packed matrix must be a module's .weight, and a stack must not: {name!r}")
        modules = {name.removesuffix(".weight"): PackedEntry.of(weight) for name, weight in packed.items()}
        return cls(modules, tuple(curve), rounding or {})

    @classmethod
    def read(cls, config: Mapping[str, Any], file: Path) -> Manifest:
        """The manifest in the content of a packed checkpoint's config.json.

        Args:
            file: that file, for errors.

        Raises:
            CheckpointError: there is no manifest, it has another version, or an entry is malformed.
        """
        section, settings = config.get(KEY), config.get("quantization_config")
        if section is None and isinstance(settings, Mapping) and "modules" in settings:
            raise CheckpointError(
                _other_version(f"quantization_config.format_version {settings.get('format_version')!r}"), file=file
            )
        if not isinstance(section, Mapping):
            raise CheckpointError(f"{KEY} is missing or not an object; convert the original checkpoint again", file=file)
        if type(version := section.get("version")) is not int or version not in (VERSION, _OTHER_FP8):
            raise CheckpointError(_other_version(f"{KEY}.version {version!r}"), file=file)
        modules, curve, rounding = section.get("modules"), section.get("curve", []), section.get("rounding", {})
        if not isinstance(modules, Mapping):
            raise CheckpointError(f"{KEY}.modules must be an object", file=file)
        if not isinstance(curve, list) or not all(isinstance(point, Mapping) for point in curve):
            raise CheckpointError(f"{KEY}.curve must be a list of objects", file=file)
        if not isinstance(rounding, Mapping):
            raise CheckpointError(f"{KEY}.rounding must be an object", file=file)
        entries = {name: _read_entry(name, entry, file) for name, entry in modules.items()}
        if version == _OTHER_FP8 and any(entry.format == "fp8" for entry in entries.values()):
            raise CheckpointError(_other_version(f"{KEY}.version {version!r} with fp8"), file=file)
        return cls(entries, tuple(curve), rounding)

    def __deepcopy__(self, memo: dict[int, Any]) -> Manifest:
        return self  # immutable

    def to_dict(self) -> dict[str, Any]:
        """The manifest as JSON types, as stored under `KEY` in config.json."""
        modules = {name: entry.to_dict() for name, entry in self.modules.items()}
        content = {"version": VERSION, "modules": modules, "curve": [dict(point) for point in self.curve]}
        return {**content, "rounding": dict(self.rounding)} if self.rounding else content

    def weights(self) -> dict[str, PackedEntry]:
        """The entries by parameter name."""
        return {name if len(entry.shape) == 3 else f"{name}.weight": entry for name, entry in self.modules.items()}

    def formats(self) -> dict[str, str]:
        """Format by module name."""
        return {name: entry.format for name, entry in self.modules.items()}

    def column_order(self, name: str, format: str) -> ColumnOrder | None:
        """The order of the columns of a parameter, see `PackedMatrix`. `format`: its only one."""
        entry = self.modules.get(name.removesuffix(".weight"))
        return None if entry is None else entry.order

    def renamed(self, rename: Callable[[str], str]) -> Manifest:
        """A copy whose modules have the names that `rename` returns for theirs."""
        return Manifest({rename(name): entry for name, entry in self.modules.items()}, self.curve, self.rounding)


def _other_version(field: str) -> str:
    return f"is packed in another layout ({field}; {KEY}.version {VERSION} is supported); convert the original checkpoint again"


def _read_entry(module: str, entry: Any, file: Path) -> PackedEntry:
    if not isinstance(entry, dict) or entry.keys() - {"column_order"} != {"format", "shape"}:
        raise CheckpointError(
            f"entry of {KEY}.modules must have format and shape, and nothing else but column_order", file=file, tensor=module
        )
    try:
        get_format(entry["format"])
    except ConfigError as error:
        raise CheckpointError(str(error), file=file, tensor=module) from error
    shape = entry["shape"]
    whole = isinstance(shape, list) and all(type(n) is int and 0 < n < 1 << 31 for n in shape)
    if not whole or len(shape) not in (2, 3):
        raise CheckpointError(f"shape must be two or three positive integers, not {shape!r}", file=file, tensor=module)
    if entry["format"] in SUPERBLOCKS and shape[-1] % SUPERBLOCK:
        raise CheckpointError(
            f"{entry['format']} needs a multiple of {SUPERBLOCK} columns, not {shape[-1]}; convert the original again",
            file=file,
            tensor=module,
        )
    return PackedEntry(entry["format"], tuple(shape), _read_order(module, entry, file))


def _read_order(module: str, entry: Mapping[str, Any], file: Path) -> ColumnOrder | None:
    if "column_order" not in entry:
        return None
    numbers, shape = entry["column_order"], entry["shape"]
    whole = isinstance(numbers, list) and len(numbers) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in numbers)
    if not whole or len(shape) != 2 or shape[-1] % math.prod(numbers):
        raise CheckpointError(
            f"column_order must be two positive integers whose product divides the columns of a matrix, not {numbers!r}",
            file=file,
            tensor=module,
        )
    return ColumnOrder(*numbers)
