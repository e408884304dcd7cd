"""Shared parts of the generation loops: prefill, stopping criteria, first positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..compat import cache_name

# Arguments with a row per picture or patch, of which copies of a prompt have copies.
_PICTURES = ("pixel_values", "mm_encoder_outputs")


class ContextLimit(StoppingCriteria):
    """Stops at the end of the model's context, where the next step would fail."""

    def __init__(self, max_positions: int) -> None:
        self.max_positions = max_positions

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full(
            (input_ids.shape[0],), input_ids.shape[1] >= self.max_positions, device=input_ids.device, dtype=torch.bool
        )


class RowStops:
    """Decides which rows end at a token. The usual criteria need no tensor operations; others are called as in Transformers.

    Attributes:
        eos: ids of end-of-sequence tokens.
        max_length: maximum number of tokens of a row, prompt included; None: no limit.
        has_eos: whether a criterion has end-of-sequence tokens.
        others: all other criteria.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        self.eos: set[int] = set()
        self.max_length: int | None = None
        self.has_eos = any(hasattr(c, "eos_token_id") for c in criteria)
        self.others = StoppingCriteriaList()
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self.eos |= set(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is MaxLengthCriteria and self.max_length is None:
                self.max_length = criterion.max_length
            else:
                self.others.append(criterion)

    def ends(self, length: int, token: int) -> bool:
        """Whether a row of `length` tokens ends at its last token by the usual criteria."""
        return token in self.eos or (self.max_length is not None and length >= self.max_length)

    def __call__(self, input_ids: torch.Tensor, tokens: list[int], scores: Any) -> list[bool]:
        ended = [self.ends(input_ids.shape[1], token) for token in tokens]
        if self.others:
            ended = [a or b for a, b in zip(ended, self.others(input_ids, scores).tolist(), strict=True)]
        return ended


def prefill(model: Any, input_ids: torch.Tensor, config: Any, model_kwargs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """Processes the prompt; the copies of `num_return_sequences` are computed once.

    Returns: logits of the last column, float32 [B, V], and the filled cache.
    """
    cache = model_kwargs[cache_name()]
    copies = config.num_return_sequences
    pictures = any(name.startswith(_PICTURES) for name in model_kwargs)
    if copies == 1 or cache.get_seq_length() or pictures:
        outputs = model._prefill(input_ids, config, model_kwargs, is_first_iteration=not config.is_assistant)
        return outputs.logits[:, -1], cache
    rows = input_ids.shape[0]
    single = {
        name: value[::copies] if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == rows else value
        for name, value in model_kwargs.items()
    }
    outputs = model._prefill(input_ids[::copies], config, single, is_first_iteration=not config.is_assistant)
    cache.batch_repeat_interleave(copies)
    return outputs.logits[:, -1].repeat_interleave(copies, 0), cache


def next_positions(model_kwargs: dict[str, Any], columns: int, rows: int) -> Any:
    """Positions of the first generated tokens, int32 [B]: one after the prompt's last, as in Transformers.

    Args:
        columns: columns of the prompt, including those in the cache.
        rows: B.
    """
    positions = model_kwargs.get("position_ids")
    if positions is None:
        return np.full(rows, columns, np.int32)
    last = positions[-3:].amax(0) if positions.ndim == 3 else positions  # of multimodal RoPE: on three axes
    return np.broadcast_to(last[:, -1].cpu().numpy().astype(np.int32) + 1, (rows,))
