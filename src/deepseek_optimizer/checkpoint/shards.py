"""Distribution of a model's tensors over several files, planned before the first is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

from .directory import INDEX, SINGLE
from .layout import Layout, Stored, bytes_of, layout_of

SHARD_BYTES = 2 << 30
_LAYER = re.compile(r".*?\.layers\.\d+(?=\.)")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def is_weights(name: str) -> bool:
    """Whether a file of this name holds a model's weights or their index, which saving the model again replaces."""
    return name in (SINGLE, INDEX) or _SHARD.fullmatch(name) is not None


class Writable(Protocol):
    """A binary file for sequential writing."""

    def write(self, data: bytes | memoryview, /) -> object: ...


@dataclass(frozen=True)
class Shard:
    """One file. `name`: within the checkpoint's directory."""

    name: str
    layout: Layout


def plan_shards(tensors: Mapping[str, Stored], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Plans files of about `shard_bytes`. A layer is never split; a layer larger than that gets its own file.

    Args:
        tensors: in the model's order; on the meta device, since only shapes and dtypes are looked at.
    """
    groups = [list(names) for _, names in groupby(tensors, _layer_of)]
    files: list[list[str]] = []
    size = 0
    for names in groups:
        more = sum(tensors[n].data.numel() * tensors[n].data.element_size() for n in names)
        if not files or size + more > shard_bytes:
            files.append([])
            size = 0
        files[-1].extend(names)
        size += more
    names = [SINGLE] if len(files) == 1 else [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    return [Shard(name, layout_of({n: tensors[n] for n in held})) for name, held in zip(names, files, strict=True)]


def _layer_of(name: str) -> str | None:
    match = _LAYER.match(name)
    return match[0] if match else None


def write_shard(file: Writable, shard: Shard, weights: Iterator[tuple[str, Stored]]) -> None:
    """Writes the shard's tensors, which `weights` yields next, each whole or in pieces, one by one without keeping them."""
    file.write(shard.layout.header)
    for expected, size in zip(shard.layout.order, shard.layout.sizes, strict=True):
        missing = size
        while True:
            found = next(weights, None)
            if found is None:
                raise AssertionError(f"the weights end where {shard.name} needs {missing} more bytes of {expected}")
            name, value = found
            data = bytes_of(value)
            if name != expected:
                raise AssertionError(f"{name} came where {shard.name} has {expected}")
            if data.nbytes > missing:
                raise AssertionError(f"{name} has {data.nbytes} bytes instead of {missing}")
            file.write(data)
            missing -= data.nbytes
            del found, value, data
            if not missing:
                break


def write_index(directory: Path, shards: Sequence[Shard]) -> None:
    """Writes model.safetensors.index.json if there is more than one file."""
    if len(shards) == 1:
        return
    total = sum(shard.layout.size - len(shard.layout.header) for shard in shards)
    weight_map = {name: shard.name for shard in shards for name in shard.layout.order}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    (directory / INDEX).write_text(text + "\n", encoding="utf-8")
