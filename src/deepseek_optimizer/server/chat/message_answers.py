"""Answers of Anthropic's /v1/messages: deltas are assembled into content blocks, and written as events."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import orjson

from ...chat.deltas import Delta, ReasoningDelta, ToolCallDelta
from ...chat.tools.base import read_json
from ...engine.request import Output
from ..http.error_formats import anthropic_error
from ..http.problems import ApiError
from .chat_answers import ChatAnswer
from .usage import Tally

Event = dict[str, Any]
Thoughts = Literal["shown", "omitted", "hidden"]


class MessageBlocks:
    """The content blocks so far, and the events of each change. At most one block is open at a time.

    Args:
        thoughts: whether reasoning is "shown", "omitted" (blocks without text) or "hidden" (no blocks).
    """

    def __init__(self, thoughts: Thoughts) -> None:
        self.content: list[dict[str, Any]] = []
        self._thoughts = thoughts
        self._open: tuple[str, int] | None = None  # type of the open block, and the index of a call
        self._parts: list[str] = []  # of the open block's text

    def feed(self, deltas: Sequence[Delta]) -> list[Event]:
        events: list[Event] = []
        for delta in deltas:
            if isinstance(delta, ToolCallDelta):
                block: dict[str, Any] = {"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}}
                events += self._enter(("tool_use", delta.index), block)
                events += self._add("input_json_delta", "partial_json", delta.arguments)
            elif not isinstance(delta, ReasoningDelta):
                events += self._enter(("text", 0), {"type": "text", "text": ""})
                events += self._add("text_delta", "text", delta.text)
            elif self._thoughts != "hidden":
                events += self._enter(("thinking", 0), {"type": "thinking", "thinking": "", "signature": ""})
                events += self._add("thinking_delta", "thinking", delta.text if self._thoughts == "shown" else "")
        return events

    def end(self) -> list[Event]:
        """Closes the open block."""
        if self._open is None:
            return []
        block, text, events = self.content[-1], "".join(self._parts), []
        if block["type"] == "tool_use":
            value = read_json(text)
            block["input"] = value if isinstance(value, dict) else {}  # of a call that was cut off
        else:
            block[block["type"]] = text
        if block["type"] == "thinking":
            # Clients send it back with the block; this server does not check it.
            block["signature"] = hashlib.sha256(text.encode()).hexdigest()
            events = [self._delta({"type": "signature_delta", "signature": block["signature"]})]
        events.append({"type": "content_block_stop", "index": len(self.content) - 1})
        self._open, self._parts = None, []
        return events

    def _enter(self, kind: tuple[str, int], block: dict[str, Any]) -> list[Event]:
        if kind == self._open:
            return []
        events = self.end()
        self._open = kind
        self.content.append(block)
        return [*events, {"type": "content_block_start", "index": len(self.content) - 1, "content_block": dict(block)}]

    def _add(self, kind: str, field: str, text: str) -> list[Event]:
        if not text:
            return []
        self._parts.append(text)
        return [self._delta({"type": kind, field: text})]

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}


class MessageCollector:
    """Collects a whole message.

    Args:
        head: `id` and `model`.
        answer: parses the outputs.
        thoughts: see `MessageBlocks`.
        dropped: tokens that were dropped from the prompt.
    """

    def __init__(self, head: dict[str, Any], answer: ChatAnswer, thoughts: Thoughts, dropped: int = 0) -> None:
        self._head, self._answer = {**head, "type": "message", "role": "assistant"}, answer
        self._blocks, self._tally = MessageBlocks(thoughts), Tally(1, 1, dropped)

    def feed(self, index: int, output: Output) -> list[Event]:
        self._tally.add(index, output)
        events = self._blocks.feed(self._answer.feed(output))
        return events + self._blocks.end() if output.finish is not None else events

    def body(self) -> dict[str, Any]:
        return {**self._head, "content": self._blocks.content, **self.end(), "usage": self.usage()}

    def begun(self) -> dict[str, Any]:
        """The message before its first block."""
        usage = {**self.usage(), "output_tokens": 0}
        return {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}

    def end(self) -> dict[str, Any]:
        """Why the message ended."""
        reason, stop = self._answer.finish, self._answer.stop_reason
        if reason == "stop" and isinstance(stop, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        names = {"length": "max_tokens", "tool_calls": "tool_use"}
        return {"stop_reason": names.get(reason, "end_turn"), "stop_sequence": None}

    def usage(self) -> dict[str, Any]:
        usage = self._tally.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        quality = {"quality": usage["quality"]} if "quality" in usage else {}
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
            **quality,
        }


class MessageEncoder:
    """Writes a message as events. Arguments as those of `MessageCollector`."""

    def __init__(self, head: dict[str, Any], answer: ChatAnswer, thoughts: Thoughts, dropped: int = 0) -> None:
        self._collector = MessageCollector(head, answer, thoughts, dropped)
        self._begun = False

    def feed(self, index: int, output: Output) -> bytes:
        events = self._collector.feed(index, output)
        if not self._begun:
            self._begun = True
            events = [{"type": "message_start", "message": self._collector.begun()}, {"type": "ping"}, *events]
        return b"".join(map(_event, events))

    def last(self) -> bytes:
        end = {"type": "message_delta", "delta": self._collector.end(), "usage": self._collector.usage()}
        return _event(end) + _event({"type": "message_stop"})

    def broken(self, error: ApiError) -> bytes:
        return _event(anthropic_error(error))


def _event(event: Event) -> bytes:
    return b"event: " + event["type"].encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"
