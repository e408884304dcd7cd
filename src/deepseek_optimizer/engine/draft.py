"""Draft tokens of speculative decoding, and the vocabulary that they are from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Draft:
    """Draft tokens for one sequence.

    Attributes:
        tokens: proposed token ids, which continue the sequence.
        q: for each token the distribution it was sampled from, float32 numpy [V]; None: tokens were chosen deterministically.
            Verification needs it to preserve the model's distribution.
    """

    tokens: list[int] = field(default_factory=list)
    q: list[Any] | None = None


class DraftVocabulary:
    """The tokens that a drafting layer has logits for, if these are not all. Other tokens have probability 0 as drafts.

    Args:
        tokens: int64 [N], ascending: the token of each logit.
        vocab_size: V, the number of tokens of the model.

    Attributes:
        token_of: the tokens as int32, for `backends.decoding.DecodeCall`.

    Raises:
        ValueError: `tokens` are not ascending token ids.
    """

    def __init__(self, tokens: npt.NDArray[np.int64], vocab_size: int) -> None:
        if not len(tokens) or tokens[0] < 0 or tokens[-1] >= vocab_size or (np.diff(tokens) <= 0).any():
            raise ValueError(f"must be ascending token ids below {vocab_size}")
        self.tokens, self.vocab_size = tokens, vocab_size
        self.token_of = tokens.astype(np.int32)

    def whole(self, logits: Any) -> Any:
        """The logits of all tokens, torch [V], from those of the draft vocabulary, torch [N]."""
        whole = logits.new_full((self.vocab_size,), -np.inf)
        whole[self.tokens] = logits
        return whole
