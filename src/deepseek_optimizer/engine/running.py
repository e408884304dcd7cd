"""A request inside the engine: its tokens and blocks, how far it is, and what chooses and writes its text. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..cache.prefix_cache import Key
from .detokenizer import Detokenizer
from .request import Output, Request
from .sampling.chooser import Chooser
from .sequence import Sequence


@dataclass(eq=False)
class Running:
    """
    Attributes:
        number: of arrival; the earlier goes first among equal priorities.
        sequence: tokens of prompt and text; what its cache lacks of them is still to be run.
        most: tokens of text at most.
        prompt: tokens of the sequence that came with the request; fewer after a window has dropped some.
        generated: tokens of text so far, those that a window dropped included.
        frequencies: the tokens that its RoPE's frequencies are made for where they are not the plain ones; 0: they are.
        keys: of its full blocks, as far as they were needed; no block behind the first that a window has moved has one.
        shareable: blocks from the beginning that may be shared with others; None: all.
        registered: blocks from the beginning that are in the prefix cache.
        cached: tokens that came out of the prefix cache at first.
        preempted: how often it lost its blocks.
        starved: how often it lost them since its last token although nobody else ran.
        states: sum of the prompt's hidden states, for embeddings: float64 [H].
        pinned: tokens that a window must keep, in the sequence's present numbering.
        started, first, last: engine's clock: taken in, first token, latest token.
    """

    number: int
    request: Request
    sequence: Sequence
    chooser: Chooser
    text: Detokenizer
    most: int
    arrived: float
    prompt: int
    generated: int = 0
    frequencies: int = 0
    keys: list[Key] = field(default_factory=list)
    shareable: int | None = None
    registered: int = 0
    cached: int = 0
    dropped: int = 0
    preempted: int = 0
    starved: int = 0
    states: npt.NDArray[np.float64] | None = None
    pinned: tuple[tuple[int, int], ...] = ()
    started: float | None = None
    first: float | None = None
    last: float | None = None
    cancelled: bool = False

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first."""
        return self.request.priority, self.number

    @property
    def missing(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.sequence.tokens) - self.sequence.cached

    @property
    def decoding(self) -> bool:
        """Whether a step brings it a token: all but the last are in the cache, and that one is its own."""
        return self.generated > 0 and self.missing == 1

    @property
    def room(self) -> int:
        """Tokens it may still get."""
        return self.most - self.generated

    def output(self) -> Output:
        """An output with what is known of it, and nothing new."""
        return Output(
            self.request.id,
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached,
            completion_tokens=self.generated,
            dropped_tokens=self.dropped,
        )
