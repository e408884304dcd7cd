"""Prompts about a text: the model's chat template around the text, which is plain data, followed by the task.

The text comes first and the task last, so that the next question about the same text finds it in the prefix cache. The text is
tokenized separately: anything in it that looks like a control token is ordinary text, whatever the model's template.

Reasoning is disabled, since it would take minutes on a small machine: if the template opens a reasoning block, it is closed.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from ..chat.control_tokens import ControlTokens, Marks
from ..chat.deltas import ContentDelta
from ..chat.reasoning import CLOSE, ReasoningParser, opened_by
from ..chat.template import ChatTemplate
from .document import Document

_SEGMENT = 1 << 16  # characters tokenized per call: some tokenizers take more than linear time
_MAX_FRAMES = 64  # cached frames
_THINKING = "enable_thinking"  # the name of this option in templates


class Prompts:
    """
    Args:
        tokenizer: of Transformers. Without a chat template, prompts are plain text.
        template: the tokenizer's chat template, if the caller already has one.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate | None = None) -> None:
        self.tokenizer = tokenizer
        self._own = template is None and bool(tokenizer.chat_template)
        self._template = ChatTemplate(tokenizer) if self._own else template
        self._frames: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self._marks = Marks()  # shared by all texts, since constructing them takes longer than encoding a passage; never shown

    def close(self) -> None:
        """Ends the template's process if this object started it; it is restarted when needed."""
        if self._own and self._template is not None:
            self._template.close()
            self._template = ChatTemplate(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text inside a prompt. Anything in it that looks like a control token is encoded as ordinary text.

        Raises:
            RequestError: it contains characters that the tokenizer itself turns into a control token.
        """
        ids: list[int] = []
        at = 0
        while at < len(text):
            end = _cut(text, at)
            ids += self._controls.encode(self._controls.mark(text[at:end], self._marks), self._marks, first=False).ids
            at = end
        return ids

    def document(self, document: Document) -> list[int]:
        """Token ids of all files; if there are several, each is preceded by its name."""
        if len(document.files) == 1:
            return self.encode(document.files[0].text)
        return [token for file in document.files for token in self.encode(f"File: {file.name}\n{file.text}\n\n")]

    def around(self, instruction: str, ahead: str = "") -> tuple[list[int], list[int]]:
        """Token ids before and after a text. Those before it do not depend on the instruction.

        Args:
            ahead: text to put before it.

        Raises:
            RequestError: the model's chat template rejects it.
        """
        frame = self._frames.get((instruction, ahead))
        if frame is None:
            if len(self._frames) >= _MAX_FRAMES:
                self._frames.clear()
            frame = self._frames[instruction, ahead] = self._around(instruction, f"{ahead}\n\n" if ahead else "")
        return frame

    def prompt(self, text: list[int], instruction: str) -> list[int]:
        """The complete prompt around a text's tokens."""
        before, after = self.around(instruction)
        return [*before, *text, *after]

    def overhead(self, instruction: str) -> int:
        """Number of tokens in a prompt besides the text's."""
        return sum(map(len, self.around(instruction)))

    @staticmethod
    def answer(text: str) -> str:
        """The text of a reply without the model's reasoning."""
        parser = ReasoningParser()
        deltas = [*parser.feed(text), *parser.finish()]
        return "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta)).strip()

    @cached_property
    def _controls(self) -> ControlTokens:
        return ControlTokens(self.tokenizer, self._template.source() if self._template is not None else "")

    @cached_property
    def _options(self) -> dict[str, Any]:
        assert self._template is not None
        return {_THINKING: False} if _THINKING in self._template.variables() else {}

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
        """Tokens that the tokenizer puts before each text."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else []


def _cut(text: str, at: int) -> int:
    """The end of the segment at `at`: after a line, or else before a space, so that its tokens are the same as in the whole
    text."""
    end = at + _SEGMENT
    if end >= len(text):
        return len(text)
    for border in ("\n", " "):
        position = text.rfind(border, at + _SEGMENT // 2, end)
        if position >= 0:
            return position + (border == "\n")
    return end
