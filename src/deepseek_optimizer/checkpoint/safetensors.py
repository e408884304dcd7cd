"""safetensors files: the header is checked completely before anything else is read.

A file consists of 8 bytes little-endian header length, a JSON header, and the tensors' bytes without gaps or overlaps. Source:
https://github.com/huggingface/safetensors (format section). The limit of 100 MB for a header is that of its reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError
from .base import TensorInfo
from .files import DataFile, parse_json

MAX_HEADER_BYTES = 100_000_000
_MAX_DIMS = 8
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class SafetensorsFile:
    """An open file whose header has been checked."""

    file: DataFile
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def open_safetensors(file: DataFile) -> SafetensorsFile:
    """Reads and checks the header. Raises CheckpointError."""
    if file.size < 8:
        raise CheckpointError(f"has {file.size} bytes; a safetensors file has at least 8", file=file.path)
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"claims a header of {length} bytes, more than {MAX_HEADER_BYTES}", file=file.path)
    if length > file.size - 8:
        raise CheckpointError(f"claims a header of {length} bytes but has {file.size}; is it truncated?", file=file.path)
    text = file.read(8, length)
    if not text.startswith(b"{"):
        raise CheckpointError("the header does not begin with '{'", file=file.path)
    header = parse_json(text, file.path, "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("__metadata__ must map strings to strings", file=file.path)
    tensors = {name: _tensor(file, 8 + length, name, entry) for name, entry in header.items()}
    _check_cover(file, 8 + length, tensors)
    return SafetensorsFile(file, tensors, metadata)


def _tensor(file: DataFile, start: int, name: str, entry: Any) -> TensorInfo:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(what, file=file.path, tensor=name[:200])

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("the header's entry must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise wrong(f"dtype {str(dtype)[:50]!r} is not supported (supported: {', '.join(_ITEM_BYTES)})")
    if not _naturals(shape) or len(shape) > _MAX_DIMS:
        raise wrong(f"shape must be a list of at most {_MAX_DIMS} integers >= 0")
    if not _naturals(offsets) or len(offsets) != 2:
        raise wrong("data_offsets must be two integers >= 0")
    begin, end = offsets
    nbytes = _ITEM_BYTES[dtype]
    for size in shape:
        nbytes *= size
    if end - begin != nbytes:
        raise wrong(f"{dtype} of shape {shape} takes {nbytes} bytes, but data_offsets give {end - begin}")
    if start + end > file.size:
        raise wrong(f"ends at byte {start + end}, but the file has {file.size}: it is truncated; download it again")
    return TensorInfo(name, dtype, tuple(shape), file.path, start + begin, nbytes)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def _check_cover(file: DataFile, start: int, tensors: dict[str, TensorInfo]) -> None:
    """Tensors must cover the rest of the file without gaps or overlaps."""
    at = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != at:
            gap = tensor.offset - at
            what = "overlaps the tensor before it" if gap < 0 else f"leaves a gap of {gap} bytes before it"
            raise CheckpointError(what, file=file.path, tensor=tensor.name[:200])
        at += tensor.nbytes
    if at != file.size:
        raise CheckpointError(f"has {file.size - at} bytes after the last tensor", file=file.path)
