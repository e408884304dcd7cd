"""Separates reasoning from the answer: `<think> ... </think>`, opened by the model or by the end of its prompt.

The tag opens reasoning only at the very start of the answer; anywhere else it is ordinary text, such as a quotation.
"""

from __future__ import annotations

from .deltas import ContentDelta, Delta, ReasoningDelta
from .scan import MarkerScanner

OPEN, CLOSE = "<think>", "</think>"
_MAX_SPACE = 64  # characters of white space allowed before the tag


def thinks(template: str) -> bool:
    """Whether a model with this chat template puts its reasoning into these tags."""
    return CLOSE in template


def opened_by(prompt: str) -> bool:
    """Whether a prompt ends inside an open tag, as those of DeepSeek-R1 do, so that the model's text starts with reasoning."""
    return prompt.rstrip().endswith(OPEN)


class ReasoningParser:
    """Splits one answer. Newlines next to the tags are layout and are dropped.

    Reasoning that is never closed remains reasoning: the answer ended within it.

    Args:
        opened: the prompt has opened the tag.
    """

    def __init__(self, opened: bool = False) -> None:
        self._close = MarkerScanner([CLOSE])
        self._state = "reasoning" if opened else "start"
        self._begin = ""  # start of the answer, while it may still become the tag
        self._newlines: list[str] = []  # after reasoning: emitted only if more reasoning follows
        self._fresh = True  # whether the reasoning, or the content after it, is still empty

    def feed(self, text: str) -> list[Delta]:
        if self._state == "start":
            self._begin += text
            text = self._begin.lstrip()
            spaced = len(self._begin) - len(text) > _MAX_SPACE
            if not spaced and len(text) < len(OPEN) and OPEN.startswith(text):
                return []  # it may still become the tag
            if spaced or not text.startswith(OPEN):
                text, self._begin, self._state = self._begin, "", "plain"
                return self._content(text)
            self._begin, self._state, text = "", "reasoning", text[len(OPEN) :]
        if self._state == "reasoning":
            return self._split(text)
        return self._content(text)

    def finish(self) -> list[Delta]:
        out: list[Delta] = []
        if self._begin:
            out.append(ContentDelta(self._begin))
        for closed, part in self._close.finish():
            out += [] if closed else self._reasoning(part)
        return out

    def _split(self, text: str) -> list[Delta]:
        out: list[Delta] = []
        for is_marker, part in self._close.feed(text):
            if self._state != "reasoning":
                out += self._content(part)
            elif is_marker:
                self._state, self._fresh = "answer", True
                self._newlines.clear()
            else:
                out += self._reasoning(part)
        if self._state == "answer":  # the text that the scanner still holds is content
            for _, part in self._close.finish():
                out += self._content(part)
        return out

    def _reasoning(self, part: str) -> list[Delta]:
        if self._fresh:
            part = part.lstrip("\n")
        body = part.rstrip("\n")
        if not body:
            if part:
                self._newlines.append(part)
            return []
        text = "".join(self._newlines) + body
        self._newlines = [part[len(body) :]] if len(part) > len(body) else []
        self._fresh = False
        return [ReasoningDelta(text)]

    def _content(self, part: str) -> list[Delta]:
        if self._state == "answer" and self._fresh:
            part = part.lstrip("\n")
        self._fresh = self._fresh and not part
        return [ContentDelta(part)] if part else []
