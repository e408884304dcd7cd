"""Steps some of whose sequences have pictures: their rows' embeddings, positions and features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..backends.base import BLOCK_TOKENS, Int32
from .sequence import Part

Embed = Callable[[Int32], torch.Tensor]


def step_fields(parts: Sequence[Part], positions: Int32, embed: Embed) -> dict[str, Any]:
    """Fields of a step some of whose sequences have pictures.

    Args:
        parts: the sequences' tokens.
        positions: int32 [T], as for sequences without pictures.
        embed: token ids, int32 [n] -> their embeddings, float32 [n, H].
    """
    positions = positions.copy()
    total = len(positions)
    embeds: torch.Tensor | None = None
    features: torch.Tensor | None = None
    axes: Int32 | None = None
    ends: Int32 | None = None
    ids = np.array([token for part in parts for token in part.ids], np.int32)
    own_ids = ids.copy()
    begin = 0
    for part in parts:
        count, pictures = len(part.ids), part.sequence.pictures
        own = slice(begin, begin + count)
        begin += count
        if pictures is None:
            continue
        positions[own] = pictures.positions_of(part.start, count)
        rows = pictures.rows(part.start, count)
        if rows.start == rows.stop:
            continue
        at = own.start + pictures.places[rows] - part.start
        if embeds is None:
            embeds = embed(ids)
        if pictures.token is not None:
            own_ids[at] = pictures.token
        embeds[torch.from_numpy(at)] = pictures.embeds[rows]
        if pictures.features:
            if features is None:
                layer_width = pictures.embeds.shape[1]
                features = torch.zeros(len(pictures.features), total, layer_width, dtype=torch.float32, device="cpu")
            for i, layer in enumerate(pictures.features):
                features[i, torch.from_numpy(at)] = layer[rows]
        if pictures.axes is not None:
            axes = np.repeat(positions[:, None], 3, 1) if axes is None else axes
            known = pictures.axes[part.start : part.start + count]
            axes[own.start : own.start + len(known)] = known
        if pictures.of is not None:
            ends = _own_ends(parts) if ends is None else ends
            of = pictures.of[part.start : part.start + count]
            last = np.append(np.flatnonzero(np.diff(of)), len(of) - 1)
            index = np.arange(len(of))
            seen = last[np.searchsorted(last, index)]
            ends[own.start : own.start + len(of)] = part.start + np.where(of < 0, index, seen) + 1
    if axes is not None:  # of sequences without axes, which come later
        same = (axes == axes[:, :1]).all(1)
        axes[same] = positions[same, None]
    fields = {"positions": positions, "inputs_embeds": embeds, "features": features, "axes": axes, "visible_to": ends}
    return {**fields, "token_ids": own_ids}


def _own_ends(parts: Sequence[Part]) -> Int32:
    """One past each row's own token, int32 [T]; blocks that are not visible do not count."""
    return np.concatenate([
        np.arange(1, len(part.ids) + 1, dtype=np.int32) + part.start - part.first_block * BLOCK_TOKENS for part in parts
    ])  # fmt: skip
