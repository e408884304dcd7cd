"""A packed checkpoint of random weights, made of a config alone, tensor by tensor: for shapes too large to be floats first.

Codes are uniform and scales constant, so that weights have a standard deviation of about 0.02; norms are 1, biases 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepseek_optimizer.checkpoint.layout import Stored, bytes_of, layout_of
from deepseek_optimizer.checkpoint.manifest import KEY, Manifest, PackedEntry
from deepseek_optimizer.graph.analysis import stack_shapes, weight_shapes
from deepseek_optimizer.graph.min_formats import exact_weights, min_formats
from deepseek_optimizer.models import build_graph
from deepseek_optimizer.quant import QUANT_METHOD, PackedMatrix, PackedStack, PackedWeight, get_format

DEVIATION = 0.02
_TABLE = "gate.tid2eid"  # experts by token id
_PIECE = 1 << 16  # tiles made at once


@dataclass(frozen=True)
class _Tile:
    """Attributes:
    codes: bytes of codes at the begin of a tile.
    scale: the bytes after them.
    mask: the bits of a byte of codes that are random.
    """

    codes: int
    scale: torch.Tensor
    mask: int = 0xFF


def _halves(deviation: float) -> torch.Tensor:
    """fp16 scales of 16 rows, for codes with this standard deviation."""
    return torch.full((16,), DEVIATION / deviation, dtype=torch.float16).view(torch.uint8)


def _tile(name: str) -> _Tile:
    if name == "int4":
        return _Tile(256, _halves(4.61))
    if name == "int8":
        return _Tile(512, _halves(73.9))
    if name == "mxfp4":
        return _Tile(256, torch.full((16,), 120, dtype=torch.uint8))  # 2^(120 - 128), for codes with a deviation of 5.9
    if name == "fp8":  # the largest exponents, and with them NaN, are left out, so that the codes' deviation is 0.6
        scale = torch.zeros(32, dtype=torch.uint8)
        scale[:4] = torch.tensor([DEVIATION / 0.6]).view(torch.uint8)
        return _Tile(512, scale, 0xBF)
    raise ValueError(f"no random tiles of {name}")


def write(config: Any, target: Path, architecture: str, format_of: Callable[[str], str] = lambda name: "int4") -> None:
    """Writes the checkpoint.

    Args:
        config: of the Transformers model.
        target: a new folder.
        architecture: its class.
        format_of: the format of a matrix, by its name, unless it is not made smaller than another one.
    """
    planned = _planned(config, format_of)
    packed = {
        "quantization_config": {"quant_method": QUANT_METHOD, "precision": "int4"},
        KEY: Manifest.of(planned).to_dict(),
    }
    described = {**config.to_dict(), "architectures": [architecture], "dtype": "bfloat16", **packed}
    layout, generator = layout_of(planned), np.random.default_rng(0)
    target.mkdir()
    (target / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with open(target / "model.safetensors", "wb") as file:
        file.write(layout.header)
        experts = getattr(config, "n_routed_experts", 0)
        for name in layout.order:
            if name.endswith(_TABLE):
                file.write(bytes_of(torch.from_numpy(generator.integers(experts, size=tuple(planned[name].shape)))))
                continue
            for piece in _pieces(name, planned[name], generator):
                file.write(bytes_of(piece))


def _planned(config: Any, format_of: Callable[[str], str]) -> dict[str, Stored]:
    """What the file holds, on the meta device."""
    graph = build_graph(config)
    stacks, least, exact = stack_shapes(graph), min_formats(graph), exact_weights(graph)
    planned: dict[str, Stored] = {}
    for name, shape in weight_shapes(graph).items():
        if name.endswith(_TABLE):
            planned[name] = torch.empty(shape, dtype=torch.int64, device="meta")
            continue
        if len(shape) == 1 or name in exact or not (name in stacks or name.endswith(".weight")):
            dtype = torch.float32 if name in exact else torch.bfloat16
            planned[name] = torch.empty(shape, dtype=dtype, device="meta")
            continue
        kind = format_of(name)
        if name in least and get_format(kind).bits < get_format(least[name]).bits:
            kind = least[name]
        planned[name] = _without_data(PackedEntry(kind, tuple(stacks.get(name, shape))))
    return planned


def _without_data(entry: PackedEntry) -> PackedWeight:
    tiles = torch.empty(entry.tiles, dtype=torch.uint8, device="meta")
    *count, rows, cols = entry.shape
    if count:
        return PackedStack(entry.format, count[0], rows, cols, tiles)
    return PackedMatrix(entry.format, rows, cols, tiles)


def _pieces(name: str, like: Stored, generator: np.random.Generator) -> Iterator[torch.Tensor]:
    if isinstance(like, torch.Tensor):
        if like.ndim == 2:
            yield torch.from_numpy(generator.standard_normal(like.shape, np.float32) * np.float32(DEVIATION)).to(like.dtype)
        else:
            yield torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0, dtype=like.dtype)
        return
    tile, size = _tile(like.format), like.data.shape[-1]
    for begin in range(0, like.data.numel() // size, _PIECE):
        count = min(_PIECE, like.data.numel() // size - begin)
        tiles = torch.from_numpy(generator.integers(256, size=(count, size), dtype=np.uint8)) & tile.mask
        tiles[:, tile.codes :] = tile.scale
        yield tiles
