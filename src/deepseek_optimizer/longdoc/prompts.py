"""Prompts about a text: what the model's chat template puts around, the text's own words as plain data, then the task.

The text comes first and the task last, so that the next question on the same text finds it in the prefix cache. Its tokens are
made by themselves: what looks like a control token in a document is ordinary text, whatever the model's template is.

A document is answered from what it says, and thoughts cost a small machine minutes: where a template opens them, they are
closed.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from ..chat.control_tokens import ControlTokens, Marks
from ..chat.deltas import ContentDelta
from ..chat.reasoning import CLOSE, ReasoningParser, opened_by
from ..chat.template import ChatTemplate
from .document import Document

_PIECE = 1 << 16  # characters that are tokenised at once: some tokenizers take more than linear time
_FRAMES = 64  # that are kept
_THINKS = "enable_thinking"  # what templates call it


class Prompts:
    """
    Args:
        tokenizer: of Transformers. Where it has no chat template, prompts are plain text.
        template: the tokenizer's, where somebody has it already.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate | None = None) -> None:
        self.tokenizer = tokenizer
        self._own = template is None and bool(tokenizer.chat_template)
        self._template = ChatTemplate(tokenizer) if self._own else template
        self._frames: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self._marks = Marks()  # the same for all texts, since making them takes longer than a passage; nobody is shown them

    def close(self) -> None:
        """Ends the process of a template of its own; there is another when it is needed."""
        if self._own and self._template is not None:
            self._template.close()
            self._template = ChatTemplate(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that stands in the midst of a prompt. What looks like a control token in it is ordinary text.

        Raises:
            RequestError: it has characters that only the tokenizer makes into a control token.
        """
        ids: list[int] = []
        at = 0
        while at < len(text):
            end = _cut(text, at)
            ids += self._controls.encode(self._controls.mark(text[at:end], self._marks), self._marks, first=False).ids
            at = end
        return ids

    def document(self, document: Document) -> list[int]:
        """Token ids of all files, each with its name before it where there are several."""
        if len(document.files) == 1:
            return self.encode(document.files[0].text)
        return [token for file in document.files for token in self.encode(f"File: {file.name}\n{file.text}\n\n")]

    def around(self, instruction: str, ahead: str = "") -> tuple[list[int], list[int]]:
        """Token ids of what stands before a text and behind it. Before it there is nothing of the instruction.

        Args:
            ahead: what is said before the text all the same.

        Raises:
            RequestError: the model's chat template does not take it.
        """
        found = self._frames.get((instruction, ahead))
        if found is None:
            if len(self._frames) >= _FRAMES:
                self._frames.clear()
            found = self._frames[instruction, ahead] = self._around(instruction, f"{ahead}\n\n" if ahead else "")
        return found

    def prompt(self, text: list[int], instruction: str) -> list[int]:
        """A whole prompt around a text's tokens."""
        before, after = self.around(instruction)
        return [*before, *text, *after]

    def overhead(self, instruction: str) -> int:
        """Tokens of a prompt beside the text's."""
        return sum(map(len, self.around(instruction)))

    @staticmethod
    def answer(text: str) -> str:
        """What a reply says, without the model's thoughts."""
        parser = ReasoningParser()
        deltas = [*parser.feed(text), *parser.finish()]
        return "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta)).strip()

    @cached_property
    def _controls(self) -> ControlTokens:
        return ControlTokens(self.tokenizer, self._template.source() if self._template is not None else "")

    @cached_property
    def _options(self) -> dict[str, Any]:
        assert self._template is not None
        return {_THINKS: False} if _THINKS in self._template.variables() else {}

    def _around(self, instruction: str, ahead: str) -> tuple[list[int], list[int]]:
        if self._template is None:
            return [*self._begin(), *self.encode(ahead)], self.encode(f"\n\n{instruction}\nAnswer:")
        before, after = self._template.around(ahead, f"\n\n{instruction}", options=self._options)
        closing: list[int] = []
        if opened_by(after.text):
            lines = "\n" if after.text.endswith("\n") else "\n\n"
            closing = self.tokenizer(f"{lines}{CLOSE}\n\n", add_special_tokens=False)["input_ids"]
        return before.ids, [*after.ids, *closing]

    def _begin(self) -> list[int]:
        """What the tokenizer begins each text with."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else []


def _cut(text: str, at: int) -> int:
    """Where a piece from `at` on ends: behind a line, or else a space, so that tokens are what they are in the whole text."""
    end = at + _PIECE
    if end >= len(text):
        return len(text)
    for border in ("\n", " "):
        found = text.rfind(border, at + _PIECE // 2, end)
        if found >= 0:
            return found + (border == "\n")
    return end
