"""Prompts about a document: what the model's chat template puts around, the document's own words as plain data, the task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .document import Document


class Prompts:
    """
    Args:
        tokenizer: of Transformers. Where it has no chat template, prompts are plain text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a document's text. What looks like a control token in it is ordinary text."""
        raise NotImplementedError

    def document_tokens(self, document: Document) -> int:
        """How many tokens a whole document has."""
        raise NotImplementedError

    def around(self, instruction: str) -> tuple[list[int], list[int]]:
        """What stands before and behind the text in question. What stands before is the same for every instruction, so that
        another question about the same text finds it in the prefix cache."""
        raise NotImplementedError

    def prompt(self, text: Sequence[int], instruction: str) -> list[int]:
        """A whole prompt around a text's tokens."""
        raise NotImplementedError

    def answer(self, text: str) -> str:
        """What a reply says, without the model's thoughts."""
        raise NotImplementedError
