"""The token ids of embeddings, for models that read more than one embedding table (Gemma 4's embeddings per layer)."""

from __future__ import annotations

from typing import Any

import torch

_CHUNK = 4096  # entries of the table that are computed at once


def embedded_ids(model: Any, embeds: torch.Tensor) -> torch.Tensor:
    """The ids whose embeddings these are, int64 [B, T]; Transformers' Gemma4TextModel finds them in the same way.

    Args:
        model: a Transformers model.
        embeds: [B, T, H], results of the model's input embeddings.

    Raises:
        ValueError: a row is not an entry of the table.
    """
    embedding = model.get_input_embeddings()
    rows = embeds.detach().flatten(0, 1)
    ids = torch.full((len(rows),), -1, dtype=torch.int64, device=rows.device)
    with torch.no_grad():
        for begin in range(0, model.config.vocab_size, _CHUNK):
            entries = torch.arange(begin, min(begin + _CHUNK, model.config.vocab_size), device=rows.device, dtype=torch.int64)
            table = embedding(entries).to(rows.dtype)
            row, entry = (rows[:, None, 0] == table[None, :, 0]).nonzero(as_tuple=True)
            equal = (rows[row] == table[entry]).all(-1)
            ids[row[equal]] = entries[entry[equal]]
    if (ids < 0).any():
        row = int((ids < 0).nonzero()[0])
        raise ValueError(
            f"inputs_embeds: row {row} is not an entry of the embedding table, so that it has no embeddings per layer; pass "
            "input_ids"
        )
    return ids.view(embeds.shape[:2])
