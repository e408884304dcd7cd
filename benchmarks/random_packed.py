"""A packed checkpoint of random weights, made of a config alone, tensor by tensor: for shapes too large to be floats first.

Codes are uniform and scales constant, so that weights have a standard deviation of 0.02; norms are 1, biases 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from deepseek_optimizer.checkpoint.layout import Stored, bytes_of, layout_of
from deepseek_optimizer.checkpoint.manifest import KEY, Manifest, PackedEntry
from deepseek_optimizer.graph.analysis import stack_shapes, weight_shapes
from deepseek_optimizer.graph.min_formats import exact_weights, min_formats
from deepseek_optimizer.models import build_graph
from deepseek_optimizer.quant import QUANT_METHOD

DEVIATION = 0.02
_CODES = {"int4": (256, 4.61), "int8": (512, 73.9)}  # bytes of codes in a tile, standard deviation of a uniform one
_PIECE = 1 << 16  # tiles made at once


def write(config: Any, target: Path, architecture: str) -> None:
    """Matrices in int4, or in what they are not made smaller than.

    Args:
        config: of the Transformers model.
        architecture: its class.
    """
    planned = _planned(config)
    packed = {
        "quantization_config": {"quant_method": QUANT_METHOD, "precision": "int4"},
        KEY: Manifest.of(planned).to_dict(),
    }
    described = {**config.to_dict(), "architectures": [architecture], "dtype": "bfloat16", **packed}
    layout, generator = layout_of(planned), torch.Generator().manual_seed(0)
    target.mkdir()
    (target / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with open(target / "model.safetensors", "wb") as file:
        file.write(layout.header)
        for name in layout.order:
            for piece in _pieces(name, planned[name], generator):
                file.write(bytes_of(piece))


def _planned(config: Any) -> dict[str, Stored]:
    """What the file holds, on the meta device."""
    graph = build_graph(config)
    stacks, least, exact = stack_shapes(graph), min_formats(graph), exact_weights(graph)
    planned: dict[str, Stored] = {}
    for name, shape in weight_shapes(graph).items():
        if len(shape) == 1 or name in exact:
            dtype = torch.float32 if name in exact else torch.bfloat16
            planned[name] = torch.empty(shape, dtype=dtype, device="meta")
            continue
        planned[name] = PackedEntry(least.get(name, "int4"), stacks.get(name, shape)).promise()
    return planned


def _pieces(name: str, like: Stored, generator: torch.Generator) -> Iterator[torch.Tensor]:
    if isinstance(like, torch.Tensor):
        if like.ndim == 2:
            yield torch.randn(like.shape, dtype=like.dtype, generator=generator) * DEVIATION
        else:
            yield torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0, dtype=like.dtype)
        return
    codes, deviation = _CODES[like.format]
    scales = torch.full((16,), DEVIATION / deviation, dtype=torch.float16).view(torch.uint8)
    size = like.data.shape[-1]
    for begin in range(0, like.data.numel() // size, _PIECE):
        count = min(_PIECE, like.data.numel() // size - begin)
        tiles = torch.randint(256, (count, size), dtype=torch.uint8, generator=generator)
        tiles[:, codes:] = scales
        yield tiles
