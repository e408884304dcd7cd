"""Answers of Ollama's /api/chat and /api/generate: one JSON object, or one per output."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import orjson

from ...chat.deltas import Delta, ReasoningDelta, ToolCallDelta
from ...chat.tools.base import read_json
from ...engine.request import Output
from ..http.error_formats import ollama_error
from ..http.problems import ApiError
from .chat_answers import ChatAnswer
from .timings import Timings

Part = dict[str, Any]  # {"content": ...}, {"thinking": ...} or {"tool_calls": [...]}


class OllamaWriter:
    """Writes one answer, as a stream of lines (`feed`, `last`) or as one object (`feed`, `body`).

    Args:
        model: its name.
        answer: parses the outputs.
        chat: whether objects have a `message`, as those of /api/chat, or a `response`, as those of /api/generate.
        thoughts: whether they contain reasoning.
    """

    def __init__(self, model: str, answer: ChatAnswer, *, chat: bool, thoughts: bool = True) -> None:
        self._model, self._answer, self._chat, self._thoughts = model, answer, chat, thoughts
        self._timings, self._calls = Timings(), ToolCalls()
        self._texts: dict[str, list[str]] = {"content": [], "thinking": []}
        self._whole: list[dict[str, Any]] = []  # tool calls

    def feed(self, index: int, output: Output) -> bytes:
        self._timings.add(output)
        parts = self._parts(self._answer.feed(output))
        if output.finish is not None and (rest := self._calls.end()):
            parts.append({"tool_calls": rest})
        for part in parts:
            for name, texts in self._texts.items():
                texts.append(part.get(name, ""))
            self._whole += part.get("tool_calls", ())
        return b"".join(self._line({**self._object(part), "done": False}) for part in parts)

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        whole: Part = {name: text for name, texts in self._texts.items() if (text := "".join(texts))}
        if self._whole:
            whole["tool_calls"] = self._whole
        return {**self._object(whole), **self._end()}

    def last(self) -> bytes:
        return self._line({**self._object({}), **self._end()})

    def broken(self, error: ApiError) -> bytes:
        return self._line(ollama_error(error))

    def _parts(self, deltas: Sequence[Delta]) -> list[Part]:
        parts: list[Part] = []
        for delta in deltas:
            if calls := self._calls.add(delta):
                parts.append({"tool_calls": calls})
            if isinstance(delta, ReasoningDelta):
                if self._thoughts:
                    parts.append({"thinking": delta.text})
            elif not isinstance(delta, ToolCallDelta):
                parts.append({"content": delta.text})
        return parts

    def _object(self, part: Part) -> dict[str, Any]:
        head = {"model": self._model, "created_at": timestamp()}
        if self._chat:
            return {**head, "message": {"role": "assistant", "content": "", **part}}
        return {**head, "response": part.get("content", ""), **({"thinking": part["thinking"]} if "thinking" in part else {})}

    def _end(self) -> dict[str, Any]:
        times, last = self._timings, self._timings.last
        return {
            "done": True,
            "done_reason": "length" if self._answer.finish == "length" else "stop",
            "total_duration": nanoseconds(times.prompt + times.answer),
            "load_duration": 0,
            "prompt_eval_count": last.prompt_tokens if last else 0,
            "prompt_eval_duration": nanoseconds(times.prompt),
            "eval_count": last.completion_tokens if last else 0,
            "eval_duration": nanoseconds(times.answer),
            **({"quality": last.quality} if last and last.quality is not None else {}),
        }

    def _line(self, value: dict[str, Any]) -> bytes:
        return orjson.dumps(value) + b"\n"


class ToolCalls:
    """Assembles the deltas of tool calls: Ollama sends each call in one object."""

    def __init__(self) -> None:
        self._index = -1  # of the call that is being assembled, and of the last one if there is none
        self._head: dict[str, Any] | None = None
        self._arguments: list[str] = []

    def add(self, delta: Delta) -> list[dict[str, Any]]:
        """Adds a delta; returns the call that is complete because the delta does not belong to it."""
        if isinstance(delta, ToolCallDelta) and delta.index == self._index:
            self._arguments.append(delta.arguments)
            return []
        done = self.end()
        if isinstance(delta, ToolCallDelta):
            self._index = delta.index
            self._head = {"id": delta.id, "name": delta.name}
            self._arguments = [delta.arguments]
        return done

    def end(self) -> list[dict[str, Any]]:
        """The call that is being assembled, if there is one."""
        if self._head is None:
            return []
        head, self._head = self._head, None
        value = read_json("".join(self._arguments))
        arguments = value if isinstance(value, dict) else {}  # of a call that was cut off
        return [{"id": head["id"], "function": {"index": self._index, "name": head["name"], "arguments": arguments}}]


def timestamp(seconds: float | None = None) -> str:
    """A time as RFC 3339; None: now."""
    moment = datetime.fromtimestamp(time.time() if seconds is None else seconds, timezone.utc)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
