"""A grammar for models that think first: it applies to the answer after the thoughts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ..request import CompiledGrammar, Grammar


class AfterThoughts:
    """A `CompiledGrammar` for thoughts, which are unconstrained, followed by an answer.

    Args:
        grammar: grammar of the answer.
        opens: the token that opens thoughts, with which the text may but need not begin. None: the prompt has opened them.
        closes: the token that ends thoughts.
        stops: end-of-text tokens, which are not allowed within thoughts.
    """

    def __init__(self, grammar: CompiledGrammar, opens: int | None, closes: int, stops: Iterable[int]) -> None:
        self._grammar, self._opens, self._closes, self._stops = grammar, opens, closes, tuple(stops)

    def start(self) -> Grammar:
        return _State(self._grammar.start(), self._opens, self._closes, self._stops)


class _State:
    """A `Grammar`. `_thoughts` is the number of tokens before the answer; None while the thoughts have not ended."""

    def __init__(self, answer: Grammar, opens: int | None, closes: int, stops: tuple[int, ...]) -> None:
        self._answer, self._opens, self._closes, self._stops = answer, opens, closes, stops
        self._tokens = 0
        self._thoughts: int | None = None

    def mask(self, bits: npt.NDArray[np.int32]) -> bool:
        if self._thoughts is not None:
            return self._answer.mask(bits)
        if self._opens is not None and self._tokens == 0:
            constrained = self._answer.mask(bits)
            if constrained:
                _set(bits, self._opens, True)
            return constrained
        bits.fill(-1)
        for token in self._stops:
            _set(bits, token, False)
        return True

    def accept(self, token: int) -> None:
        if self._thoughts is not None:
            self._answer.accept(token)
        elif self._opens is not None and self._tokens == 0 and token != self._opens:
            self._answer.accept(token)
            self._thoughts = 0
        elif token == self._closes:
            self._thoughts = self._tokens + 1
        self._tokens += 1

    def rollback(self, tokens: int) -> None:
        if self._thoughts is not None:
            of_answer = min(tokens, self._tokens - self._thoughts)
            self._answer.rollback(of_answer)
            if tokens > of_answer or (self._thoughts == 0 and tokens == self._tokens):
                self._thoughts = None
        self._tokens -= tokens

    @property
    def finished(self) -> bool:
        return self._thoughts is not None and self._answer.finished


def _set(bits: npt.NDArray[np.int32], token: int, allowed: bool) -> None:
    words, bit = bits.view(np.uint32), np.uint32(1 << token % 32)
    words[token // 32] = words[token // 32] | bit if allowed else words[token // 32] & ~bit
