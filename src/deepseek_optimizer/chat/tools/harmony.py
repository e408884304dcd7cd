"""OpenAI's harmony format, which gpt-oss writes: messages in channels.

    <|channel|>analysis<|message|>reasoning<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>
    <|start|>assistant<|channel|>final<|message|>the answer<|return|>

`analysis` is reasoning; `commentary` with a recipient is a call, and without one a remark for the user; `final` is the answer.
The prompt ends with `<|start|>assistant`. Source: https://developers.openai.com/cookbook/articles/openai-harmony
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...engine.grammar.channels import channels_source
from ...engine.grammar.source import GrammarSource
from ..deltas import ContentDelta, Delta, OutputParser, ReasoningDelta
from ..scan import MarkerScanner
from .base import CallWriter, Enforced, Tools, make_call

CHANNEL = "<|channel|>"
_START, _MESSAGE, _CONSTRAIN = "<|start|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_BETWEEN = "between"  # messages
_RECIPIENT, _NAME = re.compile(r"\bto=(?:functions\.)?([A-Za-z0-9_.:-]{1,128})"), re.compile(r"\s*([a-z]+)")
_MAX_HEAD = 512  # characters of the header of a message


class HarmonyFormat:
    """See `ToolFormat`. Its parser also separates reasoning, and is needed without tools too."""

    name = "harmony"
    markers = (CHANNEL, _START, _MESSAGE, _CONSTRAIN, *_ENDS)
    shape = None

    def source(
        self, tools: Sequence[Mapping[str, Any]], choice: str, parallel: bool, form: GrammarSource | None
    ) -> GrammarSource | None:
        return channels_source(tools, choice, form)

    def parser(self, tools: Tools, enforced: Enforced = "no") -> OutputParser:
        return HarmonyParser(enforced != "no")


class HarmonyParser:
    """See `OutputParser`. Text without any channel is content.

    Args:
        enforced: whether a grammar enforces calls, so that arguments can be emitted as they are written.
    """

    def __init__(self, enforced: bool = False) -> None:
        self._enforced, self._writer = enforced, CallWriter()
        self._scanner = MarkerScanner(HARMONY.markers)
        self._head: list[str] | None = []  # parts of the header that is being read; None: in or after a message
        self._first = True  # whether no message has begun yet
        self._kind = _BETWEEN  # of the current message: "analysis", "final" or "call"
        self._name, self._body = "", ""  # of the current call, without `enforced`
        self._reasoned = False  # whether there was reasoning

    def feed(self, text: str) -> list[Delta]:
        return [delta for is_marker, part in self._scanner.feed(text) for delta in self._take(is_marker, part)]

    def finish(self) -> list[Delta]:
        out = [delta for is_marker, part in self._scanner.finish() for delta in self._take(is_marker, part)]
        head = "".join(self._head or ())
        if self._first and CHANNEL not in head and not head.lstrip().startswith("to=") and not self._enforced:
            out += self._writer.text(head)
        return out + self._end() + self._writer.finish()

    def _take(self, is_marker: bool, part: str) -> list[Delta]:
        if self._head is not None:
            return self._header(is_marker, part)
        if is_marker and (part in _ENDS or part == _START or (part == CHANNEL and self._kind == _BETWEEN)):
            out = self._end()
            self._head = None if part in _ENDS else [part] if part == CHANNEL else []
            return out
        return self._within(part)

    def _header(self, is_marker: bool, part: str) -> list[Delta]:
        assert self._head is not None
        if is_marker and part == _MESSAGE:
            return self._begin("".join(self._head))
        self._head.append(part)
        text = "".join(self._head)
        if self._first and len(text) > _MAX_HEAD and CHANNEL not in text:
            self._head, self._kind, self._first = None, "final", False
            return [ContentDelta(text)]
        return []

    def _begin(self, head: str) -> list[Delta]:
        self._head, self._first = None, False
        recipient = _RECIPIENT.search(head)
        channel = _NAME.match(head.partition(CHANNEL)[2])
        if recipient is not None and "to=functions." in head:
            self._kind, self._name, self._body = "call", recipient.group(1), ""
            return self._writer.begin(self._name) if self._enforced else []
        named = channel.group(1) if channel else "final"
        self._kind = "final" if named in ("final", "commentary") and recipient is None else "analysis"
        return [ReasoningDelta("\n")] if self._kind == "analysis" and self._reasoned else []

    def _within(self, part: str) -> list[Delta]:
        if self._kind == "call":
            if self._enforced:
                return self._writer.fragment(part)
            self._body += part
            return []
        if self._kind == "analysis":
            self._reasoned = True
            return [ReasoningDelta(part)]
        return [ContentDelta(part)] if self._kind == "final" else []

    def _end(self) -> list[Delta]:
        kind, self._kind = self._kind, _BETWEEN
        if kind != "call" or self._enforced:
            return []
        call = make_call(self._name, self._body)
        return self._writer.text(self._body) if call is None else self._writer.call(call)


HARMONY = HarmonyFormat()
