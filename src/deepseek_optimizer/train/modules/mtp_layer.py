"""One step of a multi-token prediction layer, as a single call of the layer: a wrapper such as FSDP2, which has a layer's
weights gathered only while the layer is called, so gathers those of its norms, projections, embedding and head too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from ..saved_activations import SavedActivations
from ..shards import gathers

MTP_CHILDREN: Final = {"enorm", "hnorm", "eh_proj", "shared_head", "embed_tokens"}  # besides those of a decoder layer

Then = Callable[[torch.Tensor], Any]


class TrainedMtpLayer(nn.Module):
    """Forward of a whole step; a mixin for the class of a model's MTP layers, whose own forward is that of a decoder layer."""

    saved: SavedActivations

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return hasattr(module, "enorm") and hasattr(module, "hnorm") and hasattr(module, "shared_head")

    def forward(
        self, state: torch.Tensor, following: torch.Tensor, depth: int, then: Then | None = None, **inputs: Any
    ) -> tuple[torch.Tensor, Any]:
        """As `step`, for a `then` that needs weights of the layer."""
        return _step(self, super().forward, state, following, depth, then, inputs)


def step(
    layer: Any, state: torch.Tensor, following: torch.Tensor, depth: int, then: Then | None = None, **inputs: Any
) -> tuple[torch.Tensor, Any]:
    """The states after an MTP layer.

    Args:
        layer: the layer, prepared for training or not.
        state: [B, S, H], normed, or [B, S, n, H] with n residual streams: the states before.
        following: [B, S, H], the embeddings of the tokens, for layers without an embedding of their own; else their ids, int64
            [B, S].
        depth: number of MTP layers before.
        then: called with the normed states [B, S, H]; may use the layer's own head.
        inputs: the other keyword arguments of the decoder layer.

    Returns: the states that the next layer takes, of the shape of `state`, and the result of `then`; without it, the normed
        states.
    """
    inside = then if hasattr(layer.shared_head, "head") else None  # the model's head needs no recomputing with the layer
    if isinstance(layer, TrainedMtpLayer):
        after, result = layer(state, following, depth, inside, **inputs)
    else:
        after, result = _step(layer, layer, state, following, depth, inside, inputs)
    return after, result if then is None or inside is not None else then(result)


def _step(
    layer: Any, decode: Callable[..., Any], state: torch.Tensor, following: torch.Tensor, depth: int, then: Then | None,
    inputs: dict[str, Any],
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    if hasattr(layer, "embed_tokens"):
        following = layer.embed_tokens(following)
    embedded, before = layer.enorm(following.roll(-(depth + 1), 1)), layer.hnorm(state)
    if hasattr(layer, "eh_proj"):
        after = normed = layer.shared_head.norm(decode(layer.eh_proj(torch.cat((embedded, before), -1)), **inputs))
    else:
        after = decode(layer.e_proj(embedded)[:, :, None] + layer.h_proj(before), **inputs)
        normed = layer.shared_head.norm(layer.hc_head(after))
    if gathers(layer):  # the norm's weight is not there when the next layer's backward pass would recompute this
        layer.saved.keep(normed)
    return after, normed if then is None else then(normed)
