"""DRY's sequence breakers as tokens, computed once for each set of strings."""

from __future__ import annotations

import threading
from collections import OrderedDict

from ...engine.sampling.words import BreakerIndex, Encode
from .token_text import TokenTexts

_KEPT = 16  # sets of strings

Breakers = dict[int, tuple[tuple[int, ...], ...]]


class BreakerCache:
    """Looks up sequence breakers. The first use creates an index of the vocabulary, which takes a fraction of a second.

    Args:
        texts: of the model's tokens.
        vocab_size: number of tokens.
    """

    def __init__(self, texts: TokenTexts, vocab_size: int) -> None:
        self._texts, self._vocab_size = texts, vocab_size
        self._index: BreakerIndex | None = None
        self._known: OrderedDict[tuple[str, ...], Breakers] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, strings: tuple[str, ...], encode: Encode) -> Breakers:
        """`SamplingParams.dry_breakers` for these strings. Blocks: to be called on a thread of `Tokenizing`.

        Args:
            strings: the breakers.
            encode: tokenizes a text without special tokens.
        """
        with self._lock:
            if strings not in self._known:
                if self._index is None:
                    self._index = BreakerIndex([self._texts.bytes(token) for token in range(self._vocab_size)])
                self._known[strings] = self._index.breakers(strings, encode)
            self._known.move_to_end(strings)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
            return self._known[strings]
