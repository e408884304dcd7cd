"""How a strategy works, without an engine: it yields what a model is asked, is sent the replies, and returns a result.

    work = answer_by(task, material)          # a generator
    step = advance(work)                      # a Batch: then advance(work, replies), until it is the Result

So one strategy runs over the engine of this process (`driver.run`), over a server's, and in tests over a list of texts.
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
        max_tokens: of the reply at most.
        schema: JSON schema that the reply must keep to; None: any text.
        pinned: (begin, end) of prompt tokens that a window must keep.
        window: the prompt is to be read through a window: it may be longer than the context.
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
        text: as the model wrote it, thoughts included.
        complete: it ended by itself, and not at max_tokens.
        repeated: it said the same over and over, and was ended; `text` has that once.
        read: tokens of the prompt. cached: those of them that were known from before. generated: tokens of the reply.
        dropped: tokens that a window had let go by the end.
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
        asks: in order; the replies come in the same.
        left: tokens of prompts that later batches will bring, about; for a bar with the time left.
        last: the reply to the one ask is the answer: it may be shown as it comes.
    """

    asks: list[Ask]
    left: int = 0
    last: bool = False


@dataclass(frozen=True)
class Result:
    """
    Attributes:
        answer: text, or for an extraction a JSON value.
        citations: passages of the document that support it, the best first.
        strategy: "whole", "window", "map_reduce" or "retrieve".
        reason: why that one.
        notes: what the reader should know: a reply that was cut, a field that was found nowhere.
    """

    answer: Any
    citations: list[Citation]
    strategy: str
    reason: str = ""
    notes: list[str] = field(default_factory=list)


Work = Generator[Batch, list[Reply], Result]


def advance(work: Work, replies: list[Reply] | None = None) -> Batch | Result:
    """What a strategy wants next, or its result. replies: to the batch before; None: it begins."""
    try:
        return next(work) if replies is None else work.send(replies)
    except StopIteration as end:
        result: Result = end.value
        return result
