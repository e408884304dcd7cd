"""Layers for multi-token prediction in a checkpoint: `model.layers.{num_hidden_layers + depth}.*`, all or nothing."""

from __future__ import annotations

from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..graph.analysis import stack_shapes, weight_shapes
from ..models import build_mtp_graph, mtp_layers

# The model's own embedding and head, which a checkpoint may repeat in every MTP layer.
SHARED = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


def stored_mtp_layers(checkpoint: Checkpoint, config: Any) -> list[list[str]]:
    """The names of the tensors of each MTP layer that the checkpoint has, by depth; checked, but nothing is read.

    A checkpoint that Transformers wrote has none, whatever its config promises; one with a layer has those before it too.

    Args:
        config: a Transformers config object, or the content of a config.json.

    Raises:
        CheckpointError: a layer is half there, or a tensor has another shape than the config makes it. It names the tensor.
    """
    layers: int = (config if isinstance(config, dict) else config.to_dict())["num_hidden_layers"]
    prefixes = [f"model.layers.{layers + depth}." for depth in range(mtp_layers(config))]
    have = [depth for depth, prefix in enumerate(prefixes) if any(name.startswith(prefix) for name in checkpoint.tensors)]
    return [_layer(checkpoint, config, depth, prefixes[depth]) for depth in range(max(have, default=-1) + 1)]


def _layer(checkpoint: Checkpoint, config: Any, depth: int, prefix: str) -> list[str]:
    with torch.device("cpu"):  # from_pretrained asks inside a context that makes every tensor a meta tensor
        graph = build_mtp_graph(config, depth)
    shapes = weight_shapes(graph) | stack_shapes(graph)
    found = []
    for name, shape in shapes.items():
        for tensor, expected in checkpoint.stored(name, shape).items():
            if tensor not in checkpoint.tensors:
                if tensor.removeprefix(prefix) in SHARED or not tensor.startswith(prefix):
                    continue
                raise CheckpointError(
                    f"lacks {tensor}, though it has others of MTP layer {depth}; fetch it again, or set "
                    "num_nextn_predict_layers to 0 and leave that layer's tensors out",
                    file=checkpoint.path,
                    tensor=tensor,
                )
            if checkpoint.shape(tensor) != expected:
                raise CheckpointError(
                    f"has shape {checkpoint.shape(tensor)}, but the config makes it {expected}",
                    file=checkpoint.info(tensor).file,
                    tensor=tensor,
                )
            found.append(tensor)
    return found


def mtp_notes(checkpoint: Checkpoint, config: Any) -> list[str]:
    """What a load says of the MTP layers it leaves out."""
    layers = len(stored_mtp_layers(checkpoint, config))
    return [f"{layers} MTP layer{'s' * (layers > 1)} of the checkpoint left out: nothing here uses them yet"] * bool(layers)
