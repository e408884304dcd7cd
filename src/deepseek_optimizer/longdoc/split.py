"""A document in chunks of so many tokens, cut along its headings and paragraphs, each sharing its beginning with the one before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .document import Document

MAX_LENGTH, STRIDE = 4096, 1024  # tokens


@dataclass(frozen=True)
class Chunk:
    """
    Attributes:
        index: its place among the chunks of the document.
        file: index of the file that it is of.
        start, end: characters of the file's text.
        tokens: of text[start:end] tokenised alone, without those that a tokenizer adds.
    """

    index: int
    file: int
    start: int
    end: int
    tokens: int


def split(
    document: Document,
    tokenizer: Any,
    max_length: int = MAX_LENGTH,
    stride: int = STRIDE,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Chunk]:
    """The chunks of a document, in order; every character lies in at least one, and none reaches over two files.

    Args:
        tokenizer: of Transformers, fast or slow.
        max_length: tokens of a chunk at most, those included that the tokenizer adds (as the tokenizer's own `max_length`).
        stride: tokens that a chunk shares with the one before, about (as the tokenizer's own `stride`).
        progress: called with how many characters are done, and how many there are.

    Raises:
        ConfigError: max_length or stride is out of range.
    """
    raise NotImplementedError
