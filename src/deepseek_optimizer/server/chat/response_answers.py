"""The answer to /v1/responses: deltas are assembled into output items, and written as events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from ...chat.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from ...engine.request import Output, TokenLogprob
from ..http.problems import ApiError
from ..tokens.token_text import TokenTexts, chat_logprobs
from .chat_answers import ChatAnswer
from .usage import Tally

Event = dict[str, Any]


class ResponseItems:
    """The output items so far, and the events of each change. At most one item is open at a time."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._texts: list[str] = []  # parts of the open item's text or arguments
        self._logprobs: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._kind: tuple[str, int] | None = None  # of the open item: its type, and the index of a call

    def feed(self, deltas: Sequence[Delta], logprobs: list[dict[str, Any]]) -> list[Event]:
        events: list[Event] = []
        for delta in deltas:
            if isinstance(delta, ToolCallDelta):
                events += self._open(("function_call", delta.index), delta)
                events += self._add("response.function_call_arguments.delta", delta.arguments)
            elif isinstance(delta, ReasoningDelta):
                events += self._open(("reasoning", 0))
                events += self._add("response.reasoning_text.delta", delta.text, content_index=0)
            else:
                events += self._open(("message", 0))
                events += self._add("response.output_text.delta", delta.text, content_index=0, logprobs=logprobs)
                self._logprobs += logprobs
                logprobs = []
        return events

    def end(self, status: str, annotations: Sequence[Mapping[str, Any]] = ()) -> list[Event]:
        """Closes the open item at the end of the answer. An answer without items becomes an empty message.

        Args:
            status: of the item.
            annotations: of the message, if one is open.
        """
        events = [] if self.items else self._open(("message", 0))
        if self._kind is not None and self._kind[0] == "message":
            self._annotations = [dict(one) for one in annotations]
            where = {**self._where(), "content_index": 0}
            events += [
                {"type": "response.output_text.annotation.added", **where, "annotation_index": i, "annotation": one}
                for i, one in enumerate(self._annotations)
            ]
        return events + self._close(status)

    def _where(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _add(self, kind: str, text: str, **fields: Any) -> list[Event]:
        if not text:
            return []
        self._texts.append(text)
        return [{"type": kind, **self._where(), "delta": text, **fields}]

    def _open(self, kind: tuple[str, int], call: ToolCallDelta | None = None) -> list[Event]:
        if kind == self._kind:
            return []
        events = self._close("completed")
        self._kind = kind
        item: dict[str, Any]
        if kind[0] == "message":
            item = {"id": new_id("msg"), "type": "message", "role": "assistant", "status": "in_progress", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        elif kind[0] == "reasoning":
            item = {"id": new_id("rs"), "type": "reasoning", "status": "in_progress", "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        else:
            assert call is not None
            item = {"id": new_id("fc"), "type": "function_call", "status": "in_progress", "call_id": call.id, "name": call.name,
                    "arguments": ""}  # fmt: skip
            part = None
        self.items.append(item)
        events.append({"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": dict(item)})
        if part is not None:
            events.append({"type": "response.content_part.added", **self._where(), "content_index": 0, "part": part})
        return events

    def _close(self, status: str) -> list[Event]:
        if self._kind is None:
            return []
        item, text, kind = self.items[-1], "".join(self._texts), self._kind[0]
        item["status"] = status
        events: list[Event]
        if kind == "function_call":
            item["arguments"] = text
            events = [
                {"type": "response.function_call_arguments.done", **self._where(), "name": item["name"], "arguments": text}
            ]
        else:
            where = {**self._where(), "content_index": 0}
            if kind == "message":
                part = {"type": "output_text", "text": text, "annotations": self._annotations, "logprobs": self._logprobs}
                done = {"type": "response.output_text.done", **where, "text": text, "logprobs": self._logprobs}
            else:
                part = {"type": "reasoning_text", "text": text}
                done = {"type": "response.reasoning_text.done", **where, "text": text}
            item["content"] = [part]
            events = [done, {"type": "response.content_part.done", **where, "part": part}]
        events.append({"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": dict(item)})
        self._kind, self._texts, self._logprobs = None, [], []
        return events


class ResponseCollector:
    """Collects a whole `response`.

    Args:
        head: fields that are known in advance.
        answer: parses the outputs.
        texts: of the model's tokens; None: no log probabilities.
        dropped: tokens that were dropped from the prompt.
    """

    def __init__(self, head: dict[str, Any], answer: ChatAnswer, texts: TokenTexts | None, dropped: int = 0) -> None:
        self._head, self._answer, self._texts = head, answer, texts
        self._items = ResponseItems()
        self._tally = Tally(1, 1, dropped)
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text is still held back

    def feed(self, index: int, output: Output) -> list[Event]:
        self._tally.add(index, output)
        self._logprobs += output.logprobs or ()
        deltas = self._answer.feed(output)
        logprobs: list[dict[str, Any]] = []
        if self._texts is not None and any(isinstance(delta, ContentDelta) for delta in deltas):
            logprobs, self._logprobs = chat_logprobs(self._logprobs, self._texts), []
        events = self._items.feed(deltas, logprobs)
        if output.finish is not None:
            events += self._items.end(
                "incomplete" if output.finish == "length" else "completed", self._answer.cited.get("annotations", ())
            )
        return events

    def body(self) -> dict[str, Any]:
        truncated = self._answer.finish == "length"
        return {
            **self._head,
            "status": "incomplete" if truncated else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if truncated else None,
            "output": self._items.items,
            **{name: value for name, value in self._answer.cited.items() if name == "document"},
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._tally.usage()
        dropped: dict[str, Any] = {
            name: usage[name] for name in ("dropped_tokens", "context_tokens", "quality") if name in usage
        }
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._answer.reasoning_tokens},
            "total_tokens": usage["total_tokens"],
            **dropped,
        }


class ResponseEncoder:
    """Writes a response as numbered events. Arguments as those of `ResponseCollector`."""

    def __init__(self, head: dict[str, Any], answer: ChatAnswer, texts: TokenTexts | None, dropped: int = 0) -> None:
        self._head, self._collector = head, ResponseCollector(head, answer, texts, dropped)
        self._number = 0

    def feed(self, index: int, output: Output) -> bytes:
        events = self._collector.feed(index, output)
        return self._encode(self._begin() + events)

    def progressed(self, index: int) -> bytes:
        """An event without text, for the progress of the prompt."""
        begun = {"type": "response.in_progress", "response": {**self._head, "status": "in_progress"}}
        return self._encode(self._begin() or [begun])

    def _begin(self) -> list[Event]:
        """The first events, once."""
        if self._number:
            return []
        begun = {**self._head, "status": "in_progress"}
        return [{"type": "response.created", "response": begun}, {"type": "response.in_progress", "response": begun}]

    def body(self) -> dict[str, Any]:
        """The response, after the last output."""
        return self._collector.body()

    def last(self) -> bytes:
        body = self.body()
        return self._encode([{"type": f"response.{body['status']}", "response": body}])

    def broken(self, error: ApiError) -> bytes:
        detail = {"code": "server_error", "message": error.message}
        return self._encode([{"type": "response.failed", "response": {**self._head, "status": "failed", "error": detail}}])

    def _encode(self, events: list[Event]) -> bytes:
        lines = []
        for event in events:
            event["sequence_number"] = self._number
            self._number += 1
            lines.append(b"event: " + event["type"].encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n")
        return b"".join(lines)


def new_response(model: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A response before generation has begun; `fields`: those that repeat the request."""
    return {
        "id": new_id("resp"), "object": "response", "created_at": int(time.time()), "status": "in_progress", "error": None,
        "incomplete_details": None, "model": model, "output": [], "truncation": "disabled", "usage": None, **fields,
    }  # fmt: skip


def new_id(kind: str) -> str:
    """An unpredictable id for a response or an item."""
    return f"{kind}_{uuid.uuid4().hex}"
