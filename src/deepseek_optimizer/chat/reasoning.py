"""Thoughts apart from the answer: `<think> ... </think>`, where the model or the end of its prompt opens it.

A tag opens only at the very beginning of the answer: later, and everywhere in what a person might quote, it is text.
"""

from __future__ import annotations

from .deltas import ContentDelta, Delta, ReasoningDelta
from .scan import MarkerScanner

OPEN, CLOSE = "<think>", "</think>"
_MAX_SPACE = 64  # characters of white space before the tag; behind more the text is an answer


def thinks(template: str) -> bool:
    """Whether a model with this chat template thinks in these tags."""
    return CLOSE in template


def opened_by(prompt: str) -> bool:
    """Whether a prompt ends inside an open tag, as those of DeepSeek-R1 do, so that the model's text begins with thoughts."""
    return prompt.rstrip().endswith(OPEN)


class ReasoningParser:
    """Splits one answer. Newlines between the tags and what stands beside them belong to the layout and are dropped.

    Thoughts that are never closed remain thoughts: the answer ended among them.

    Args:
        opened: the prompt has opened the tag.
    """

    def __init__(self, opened: bool = False) -> None:
        self._close = MarkerScanner([CLOSE])
        self._state = "thoughts" if opened else "start"
        self._begin = ""  # of the answer, while it may yet be the tag
        self._newlines: list[str] = []  # behind thoughts: they come out only if more thoughts follow
        self._fresh = True  # nothing of the thoughts, or of the content behind them, has come yet

    def feed(self, text: str) -> list[Delta]:
        if self._state == "start":
            self._begin += text
            text = self._begin.lstrip()
            spaced = len(self._begin) - len(text) > _MAX_SPACE
            if not spaced and len(text) < len(OPEN) and OPEN.startswith(text):
                return []  # it may yet become the tag
            if spaced or not text.startswith(OPEN):
                text, self._begin, self._state = self._begin, "", "plain"
                return self._content(text)
            self._begin, self._state, text = "", "thoughts", text[len(OPEN) :]
        if self._state == "thoughts":
            return self._split(text)
        return self._content(text)

    def finish(self) -> list[Delta]:
        out: list[Delta] = []
        if self._begin:
            out.append(ContentDelta(self._begin))
        for closed, piece in self._close.finish():
            out += [] if closed else self._thoughts(piece)
        return out

    def _split(self, text: str) -> list[Delta]:
        out: list[Delta] = []
        for is_marker, piece in self._close.feed(text):
            if self._state != "thoughts":
                out += self._content(piece)
            elif is_marker:
                self._state, self._fresh = "answer", True
                self._newlines.clear()
            else:
                out += self._thoughts(piece)
        if self._state == "answer":  # what the scanner still holds is not its business any more
            for _, piece in self._close.finish():
                out += self._content(piece)
        return out

    def _thoughts(self, piece: str) -> list[Delta]:
        if self._fresh:
            piece = piece.lstrip("\n")
        body = piece.rstrip("\n")
        if not body:
            if piece:
                self._newlines.append(piece)
            return []
        text = "".join(self._newlines) + body
        self._newlines = [piece[len(body) :]] if len(piece) > len(body) else []
        self._fresh = False
        return [ReasoningDelta(text)]

    def _content(self, piece: str) -> list[Delta]:
        if self._state == "answer" and self._fresh:
            piece = piece.lstrip("\n")
        self._fresh = self._fresh and not piece
        return [ContentDelta(piece)] if piece else []
