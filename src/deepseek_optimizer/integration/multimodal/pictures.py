"""What the rows of pictures have besides their embeddings, as the language model's forward gets it: positions on three axes,
features for the first layers, and which tokens belong to one picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...backends.base import Int32
from ..generation.steps import PictureColumns


@dataclass
class Call:
    """A call of the language model in the form that a plan serves.

    Attributes:
        arguments: those of a causal model's forward.
        pictures: what the rows of pictures have besides; None: nothing.
        reason: why the plan cannot serve the call; None: it can.
    """

    arguments: dict[str, Any]
    pictures: PictureColumns | None = None
    reason: str | None = None


def with_layer_inputs(model: Any, call: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the whole model's forward with the embeddings per layer of its tokens, if it has any (Gemma 4 E2B and E4B).
    Otherwise the forward would read the embedding table as a parameter, which packing changes.

    Args:
        model: the whole model.
        call: the arguments.

    Returns: the arguments, and those that `plain_call` needs, whose token ids are those for the embeddings per layer: padding
        in place of pictures.
    """
    text = model.config.get_text_config()
    ids = call.get("input_ids")
    if not getattr(text, "hidden_size_per_layer_input", 0) or ids is None or call.get("inputs_embeds") is not None:
        return call, call
    config = model.config
    named = (config.image_token_id, config.video_token_id, config.audio_token_id)
    special = torch.tensor([token for token in named if token is not None], dtype=ids.dtype, device=ids.device)
    own = torch.where(torch.isin(ids, special), text.pad_token_id, ids)
    made = {name: value for name, value in call.items() if name != "input_ids"}
    made["inputs_embeds"] = model.get_input_embeddings()(ids)  # by which the places of pictures are found
    made["per_layer_inputs"] = model.model.language_model.get_per_layer_inputs(own, None)
    return made, {**call, "input_ids": own}


def plain_call(call: dict[str, Any], outer: dict[str, Any] | None, token_types: str) -> Call:
    """Converts the arguments that a multimodal model passes to its language model.

    Args:
        call: these arguments; not changed.
        outer: the arguments of the whole model's forward; None: the language model was called by itself.
        token_types: as in `models.Multimodal`; "": attention is causal.
    """
    plain = dict(call)
    features = plain.pop("deepstack_visual_embeds", None)
    where = plain.pop("visual_pos_masks", None)
    mask, embeds = plain.get("attention_mask"), plain.get("inputs_embeds")
    if isinstance(mask, dict) or (isinstance(mask, torch.Tensor) and mask.ndim == 4):
        mask = None if outer is None else outer.get("attention_mask")
        if outer is None or isinstance(mask, dict):
            return Call(plain, reason="attention_mask is not a 2-D tensor")
        plain["attention_mask"] = mask
    if plain.pop("per_layer_inputs", None) is not None:  # of tokens, which the plan looks up itself
        if outer is None or outer.get("input_ids") is None:
            return Call(plain, reason="per_layer_inputs are given without token ids")
        plain["ids_of_layers"] = outer["input_ids"]
    axes = None
    if isinstance(positions := plain.get("position_ids"), torch.Tensor) and positions.ndim == 3:
        if positions.shape[0] not in (3, 4):
            return Call(plain, reason="position_ids is not a tensor of 3 axes")
        if positions.shape[0] == 4 and mask is None and bool((positions[0].diff(dim=-1) != 1).any()):
            return Call(plain, reason="rows pack several documents")
        by_axis = positions[-3:].permute(1, 2, 0)
        plain["position_ids"] = by_axis.amax(-1)
        if bool((by_axis != by_axis[..., :1]).any()):
            axes = by_axis.cpu().numpy().astype(np.int32)
    pictures = _pictures(outer, token_types) if token_types else None
    if axes is None and features is None and pictures is None:
        return Call(plain)
    if features is not None and call.get("output_hidden_states"):
        return Call(plain, reason="output_hidden_states is requested, and features of pictures are added between layers")
    rows, q = embeds.shape[:2] if isinstance(embeds, torch.Tensor) else plain["input_ids"].shape
    if axes is not None:
        axes = np.broadcast_to(axes[:, -q:], (rows, q, 3))
    index = None
    if features is not None:
        index = np.full(rows * q, -1, np.int64)
        places = np.flatnonzero(where.reshape(-1).cpu().numpy())
        index[places] = np.arange(len(places))
        index = index.reshape(rows, q)
    return Call(plain, PictureColumns(axes, None if pictures is None else pictures[:, -q:], features, index))


def _pictures(outer: dict[str, Any] | None, token_types: str) -> Int32 | None:
    """The number of the picture that each token belongs to, int32 [B, columns], -1: of none; None: there are no pictures."""
    types = None if outer is None else outer.get(token_types)
    if types is None:
        return None
    seen = types.cpu().numpy() > 0
    if not seen.any():
        return None
    begins = seen & ~np.pad(seen, ((0, 0), (1, 0)))[:, :-1]
    return np.where(seen, begins.cumsum(1) - 1, -1).astype(np.int32)
