"""A model without knowledge: random tokens among those that a grammar allows, until the text ends."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

_CLOSING = ('"', "}", "]", '"}', '"]', '"}}', ">", ", ", ",")
_SHORT = ("0", "1", "true", "null", "a", "-", ":", ".", "/", "@", "Z", "T")


class RandomModel:
    """
    Args:
        tokenizer: a tokenizer of Transformers.
        vocab_size: number of logits.
        seed: each gives a different text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        texts = [tokenizer.decode([i]) if i < len(tokenizer) else "" for i in range(vocab_size)]
        self._closing = np.array([text in _CLOSING for text in texts])
        self._short = np.array([text in _SHORT for text in texts])
        self._plain = np.array([text.isascii() and text.isprintable() and 0 < len(text) < 5 for text in texts])

    def text(self, compiled: Any, seed: int, limit: int = 400) -> str | None:
        """A complete text; None if it has not ended after `limit` tokens. After 60, closing characters are preferred."""
        grammar, choose, ids = compiled.start(), random.Random(seed), []
        bits = np.zeros(-(-self._vocab_size // 32), np.int32)
        while not grammar.finished:
            allowed = np.ones(self._vocab_size, bool)
            if grammar.mask(bits):
                allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[: self._vocab_size].astype(bool)
            assert not allowed[len(self._tokenizer) :].any(), "the mask allows tokens beyond the vocabulary"
            assert allowed.any(), "the mask allows no token"
            eos = self._tokenizer.eos_token_id
            if allowed[eos] and choose.random() < (0.4 if len(ids) < 60 else 1):
                grammar.accept(eos)
                assert grammar.finished
                break
            allowed[eos] = False
            late, odd = len(ids) >= 60, choose.random() < 0.1
            wanted = [
                allowed & kind for kind in ((self._closing, self._short) if late else (allowed,) if odd else (self._plain,))
            ]
            pool = np.flatnonzero(next((mask for mask in wanted if mask.any()), allowed))
            if not len(pool):
                continue
            token = int(choose.choice(pool))
            grammar.accept(token)
            ids.append(token)
            if len(ids) == limit:
                return None
        return str(self._tokenizer.decode(ids))
