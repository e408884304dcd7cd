"""`LongDocument`: a book, a log, a repository goes in; answers come out, with their places in the text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .citations import Citation
from .document import Document
from .split import Chunk


@dataclass(frozen=True)
class Tokens:
    """read: of prompts, those included that were cached: known from before. generated: of replies."""

    read: int = 0
    cached: int = 0
    generated: int = 0


@dataclass(frozen=True)
class Answer:
    """
    Attributes:
        answer: text, or for an extraction a JSON value.
        citations: passages of the document that support it, the best first.
        strategy, reason: which one answered, and why.
        tokens: of all prompts and replies.
        seconds: that it took.
        peak_memory_gb: the most memory, in 10^9 bytes, that this process had of its own while it answered (resident and not
            mapped from a file: `RssAnon`), above what it had when the `LongDocument` was made, model and weights included.
            Sampled 50 times a second. None where the system doesn't tell.
        notes: what the reader should know: a reply that was cut, a field that was found nowhere.
    """

    answer: Any
    citations: list[Citation]
    strategy: str
    reason: str
    tokens: Tokens
    seconds: float
    peak_memory_gb: float | None
    notes: list[str] = field(default_factory=list)


class LongDocument:
    """
    Args:
        model: of `load_model`.
        tokenizer: the model's.
        document: a `Document`, one path, several paths, or a text (`Document.of_texts`).
        max_length, stride: tokens of a chunk at most, and those that it shares with the one before.
        strategy: "auto", "whole", "window", "map_reduce" or "retrieve".
        memory: bytes that all of this may take above the weights; None: as much as the model's own cache may.
        cache_dir: where the document's cache is kept between processes; None: nowhere.

    Raises:
        ConfigError: a bad argument, or too little memory.
        DocumentError: no file could be read.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        document: Document | str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        max_length: int = 4096,
        stride: int = 1024,
        strategy: str = "auto",
        memory: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        raise NotImplementedError

    @property
    def chunks(self) -> list[Chunk]:
        """Of all files, in order."""
        raise NotImplementedError

    def ask(self, question: str, *, strategy: str | None = None) -> Answer:
        """The answer to a question, from the document."""
        raise NotImplementedError

    def summarize(self, *, strategy: str | None = None) -> Answer:
        """A summary of the whole document."""
        raise NotImplementedError

    def extract(self, schema: Mapping[str, Any], *, strategy: str | None = None) -> Answer:
        """Data of the document, valid under a JSON schema of an object."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the document and what the model has read of it so far to a directory."""
        raise NotImplementedError

    @classmethod
    def open(cls, path: str | os.PathLike[str], model: Any, tokenizer: Any, **options: Any) -> LongDocument:
        """What `save` wrote; questions on it find what was read in the cache."""
        raise NotImplementedError
