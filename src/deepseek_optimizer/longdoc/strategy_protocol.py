"""The protocol of a strategy, independent of an engine: it yields prompts, receives the replies, and returns a result.

    work = answer_by(task, material)          # a generator
    step = advance(work)                      # a Batch; then advance(work, replies) until it is the Result

So the same strategy runs on an engine in this process (`driver.run`), in a server, and in tests on a list of texts.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .citations import Citation


@dataclass(frozen=True)
class Ask:
    """One prompt.

    Attributes:
        prompt: token ids.
        max_tokens: maximum length of the reply.
        schema: JSON schema that the reply must match; None: any text.
        pinned: (begin, end) of prompt tokens that a window must not drop.
        window: use a sliding window: the prompt may be longer than the context.
    """

    prompt: list[int]
    max_tokens: int
    schema: Mapping[str, Any] | None = None
    pinned: tuple[tuple[int, int], ...] = ()
    window: bool = False


@dataclass(frozen=True)
class Reply:
    """
    Attributes:
        text: as generated, including reasoning.
        complete: it ended by itself and not at max_tokens.
        repeated: it repeated itself and was stopped; `text` has the passage once.
        read: tokens of the prompt. cached: those of them in the prefix cache. generated: tokens of the reply.
        dropped: tokens that a window has dropped by the end.
    """

    text: str
    complete: bool = True
    read: int = 0
    cached: int = 0
    generated: int = 0
    dropped: int = 0
    repeated: bool = False


@dataclass(frozen=True)
class Batch:
    """
    Attributes:
        asks: in order; the replies have the same order.
        left: estimated prompt tokens of later batches, for a progress bar.
        last: the reply to the only ask is the answer and can be streamed.
    """

    asks: list[Ask]
    left: int = 0
    last: bool = False


@dataclass(frozen=True)
class Result:
    """
    Attributes:
        answer: text, or for an extraction a JSON value.
        citations: passages of the document that support it, best first.
        strategy: "whole", "window", "map_reduce" or "retrieve".
        reason: why it was chosen.
        notes: for the user: for example, a truncated reply, or a field that was not found.
    """

    answer: Any
    citations: list[Citation]
    strategy: str
    reason: str = ""
    notes: list[str] = field(default_factory=list)


Work = Generator[Batch, list[Reply], Result]


def advance(work: Work, replies: list[Reply] | None = None) -> Batch | Result:
    """The next batch of a strategy, or its result. replies: to the previous batch; None: start."""
    try:
        return next(work) if replies is None else work.send(replies)
    except StopIteration as end:
        result: Result = end.value
        return result
