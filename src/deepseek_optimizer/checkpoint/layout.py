"""The layout of a safetensors file to be written, computed from shapes and dtypes alone.

Packed tensors start at multiples of 64 bytes where sizes permit, so that a mapped file can be used in place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..quant import PackedWeight

Stored = torch.Tensor | PackedWeight  # all three hold their data in `.data`

_ALIGN = 64
_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int64: "I64",
    torch.int32: "I32",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """One file. `header`: its first bytes, including the length; `order`: its tensors in file order; `sizes`: their bytes;
    `size`: total bytes."""

    header: bytes
    order: tuple[str, ...]
    sizes: tuple[int, ...]
    size: int


def layout_of(tensors: Mapping[str, Stored]) -> Layout:
    """The layout of a file of these tensors, which may be on the meta device.

    Raises:
        ValueError: a dtype that cannot be stored.
    """
    plain = {name: value.data for name, value in tensors.items()}
    sizes = {name: t.numel() * t.element_size() for name, t in plain.items()}
    # The format allows no gaps, so sizes that preserve the alignment come first, then larger items before smaller ones.
    order = sorted(plain, key=lambda n: (sizes[n] % _ALIGN != 0, -plain[n].element_size(), n))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        if plain[name].dtype not in _DTYPES:
            raise ValueError(f"{name}: {plain[name].dtype} cannot be saved; use one of {', '.join(map(str, _DTYPES))}")
        header[name] = {
            "dtype": _DTYPES[plain[name].dtype],
            "shape": list(plain[name].shape),
            "data_offsets": [at, at + sizes[name]],
        }
        at += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    lengths = tuple(sizes[name] for name in order)
    return Layout(len(text).to_bytes(8, "little") + text, tuple(order), lengths, 8 + len(text) + at)


def bytes_of(value: Stored) -> memoryview:
    """A tensor's bytes as they are stored in a file; not copied if it is contiguous and on the CPU."""
    return value.data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
