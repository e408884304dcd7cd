"""Answers to a chat: the engine's outputs are parsed into content, reasoning and tool calls, and written as JSON or events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson

from ...chat.deltas import ContentDelta, Delta, OutputParser, ReasoningDelta, ToolCallDelta, collect
from ...engine.request import Output, TokenLogprob
from ..http.problems import ApiError
from ..tokens.token_text import TokenTexts, chat_logprobs
from .reports import Report
from .usage import Tally

DONE = b"data: [DONE]\n\n"
UNFINISHED = b',"logprobs":null,"finish_reason":null}]'


class ChatAnswer:
    """Parses the outputs of one answer. Streams and whole answers use the same calls, so that their texts are identical.

    Args:
        parser: None: the text is only content.
        one_call: drop all tool calls but the first.

    Attributes:
        reasoning_tokens: number of tokens of reasoning so far.
        called: whether there was a tool call.
        finish: why the answer ended; "" until it has.
        cited: additional fields of the message for an answer from documents: `annotations` and `document`.
        progress: tokens of documents that have been processed, and that remain; None: nothing new.
        stop_reason: the stop string or token that ended the answer.
        shows_reasoning: whether the deltas contain reasoning.
    """

    def __init__(self, parser: OutputParser | None, one_call: bool = False) -> None:
        self._parser, self._one_call = parser, one_call
        self._thinking = False
        self.reasoning_tokens = 0
        self.called = False
        self.finish = ""
        self.cited: dict[str, Any] = {}
        self.progress: tuple[int, int] | None = None
        self.stop_reason: str | int | None = None
        self.shows_reasoning = True

    def feed(self, output: Output) -> list[Delta]:
        """Parses an output; returns the new deltas."""
        parser = self._parser
        if parser is None:
            deltas: list[Delta] = [ContentDelta(output.text)] if output.text else []
        else:
            deltas = parser.feed(output.text) if output.text else []
            if output.finish is not None:
                deltas += parser.finish()
            if self._one_call:
                deltas = [delta for delta in deltas if not isinstance(delta, ToolCallDelta) or delta.index == 0]
            if deltas:
                self._thinking = isinstance(deltas[-1], ReasoningDelta)
                self.called = self.called or any(isinstance(delta, ToolCallDelta) for delta in deltas)
            if self._thinking:
                self.reasoning_tokens += len(output.token_ids)
            if not self.shows_reasoning:
                deltas = [delta for delta in deltas if not isinstance(delta, ReasoningDelta)]
        if output.finish is not None:
            self.finish = "tool_calls" if self.called and output.finish == "stop" else output.finish
            self.stop_reason = output.stop_reason
        return deltas


class ChatCollector:
    """Collects whole answers into a `chat.completion`."""

    def __init__(
        self,
        head: dict[str, Any],
        answers: list[ChatAnswer],
        texts: TokenTexts | None,
        dropped: int = 0,
        reports: Sequence[Report] = (),
    ) -> None:
        self._head, self._answers, self._texts, self._reports = head, answers, texts, reports
        self._deltas: list[list[Delta]] = [[] for _ in answers]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in answers]
        self._tally = Tally(len(answers), len(answers), dropped)

    def feed(self, index: int, output: Output) -> None:
        self._deltas[index] += self._answers[index].feed(output)
        self._logprobs[index] += output.logprobs or ()
        self._tally.add(index, output)

    def body(self) -> dict[str, Any]:
        choices = []
        for index, answer in enumerate(self._answers):
            parsed = collect(self._deltas[index])
            message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
            if parsed.reasoning:
                message["reasoning_content"] = parsed.reasoning
            message |= answer.cited
            if parsed.tool_calls:
                message["content"] = parsed.content or None
                message["tool_calls"] = [
                    {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                    for call in parsed.tool_calls
                ]
            logprobs = {"content": chat_logprobs(self._logprobs[index], self._texts)} if self._texts else None
            choice = {
                "index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish,
                "stop_reason": answer.stop_reason, "token_ids": None,
            }  # fmt: skip
            choices.append(choice | self._reports[index].of_answer() if self._reports else choice)
        usage = self._tally.usage(sum(answer.reasoning_tokens for answer in self._answers))
        of_prompt = {"prompt_logprobs": None, "prompt_token_ids": None} | (
            self._reports[0].of_prompt() if self._reports else {}
        )
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage, **of_prompt}


class ChatEncoder:
    """Writes answers as chunks, `data: {...}`. The constant parts of a chunk are encoded once, not for every token.

    Args:
        head: fields that are known in advance.
        answers: parse the outputs.
        texts: of the model's tokens; None: no log probabilities.
        include_usage: send a last chunk with the usage.
        dropped: tokens that were dropped from the prompt.
        continuous_usage: every chunk has the usage so far. As with vLLM, only the first chunk then has no token: the reason why
            the answer ended is in the chunk with its last text.
    """

    def __init__(
        self,
        head: dict[str, Any],
        answers: list[ChatAnswer],
        texts: TokenTexts | None,
        include_usage: bool,
        dropped: int = 0,
        continuous_usage: bool = False,
        reports: Sequence[Report] = (),
    ) -> None:
        self._reports = reports
        self._answers, self._texts, self._include_usage = answers, texts, include_usage
        self._continuous_usage = continuous_usage
        self._tally = Tally(len(answers), len(answers), dropped)
        self._begun = [False] * len(answers)
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in answers]  # of tokens whose text is still held back
        self._head = b"data: " + orjson.dumps({**head, "object": "chat.completion.chunk"})[:-1] + b',"choices":['
        self._openings = [self._head + b'{"index":%d,"delta":' % index for index in range(len(answers))]
        self._end = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._close = UNFINISHED + self._end

    def feed(self, index: int, output: Output) -> bytes:
        answer = self._answers[index]
        chunks = [] if self._begun[index] else [self._first(index, output)]
        deltas = answer.feed(output)
        self._count(index, output)
        if output.logprobs is not None:
            self._logprobs[index] += output.logprobs
        if answer.progress is not None:
            progress = {"document": dict(zip(("read", "left"), answer.progress, strict=True))}
            answer.progress = None
            chunks.append(self._openings[index] + orjson.dumps(progress) + self._close)
        finish = b""
        if output.finish is not None:
            finish = orjson.dumps(self._finish(answer)) + b',"stop_reason":' + orjson.dumps(answer.stop_reason)
        merged = deltas.pop() if finish and deltas and self._continuous_usage and not answer.cited else None
        for delta in deltas:
            close = self._closing(index) if self._logprobs[index] else self._close
            chunks.append(self._openings[index] + self._delta(delta) + self._of_answer(index) + close)
        if finish:
            last = orjson.dumps(answer.cited) if merged is None else self._delta(merged)
            chunks.append(self._openings[index] + last + self._of_answer(index) + self._closing(index, finish))
        return b"".join(chunks)

    def progressed(self, index: int) -> bytes:
        """A chunk without text, for the progress of the prompt."""
        return self._openings[index] + b"{}" + self._close if self._begun[index] else self._begin(index)

    def _first(self, index: int, output: Output) -> bytes:
        """The first chunk of an answer, whose usage has no token yet."""
        self._count(index, replace(output, completion_tokens=0))
        return self._begin(index)

    def _begin(self, index: int) -> bytes:
        """The chunk with the role."""
        self._begun[index] = True
        opening = self._openings[index]
        if self._reports and (of_prompt := self._reports[index].chunk_of_prompt()):
            opening = b"data: {" + of_prompt + b"," + opening.removeprefix(b"data: {")
        return opening + b'{"role":"assistant","content":""}' + self._close

    def _count(self, index: int, output: Output) -> None:
        """Counts the tokens of an answer so far."""
        self._tally.add(index, output)
        if self._continuous_usage:
            self._end = b',"usage":' + orjson.dumps(self._usage()) + b"}\n\n"
            self._close = UNFINISHED + self._end

    def _of_answer(self, index: int) -> bytes:
        """The fields of the answer's report in a chunk, after a comma."""
        field = self._reports[index].chunk_of_answer() if self._reports else b""
        return b"," + field if field else b""

    def _closing(self, index: int, finish: bytes = b"null") -> bytes:
        """The end of a chunk, with the log probabilities of all tokens since the last one."""
        pending, self._logprobs[index] = self._logprobs[index], []
        logprobs = orjson.dumps({"content": chat_logprobs(pending, self._texts)}) if pending and self._texts else b"null"
        return b',"logprobs":' + logprobs + b',"finish_reason":' + finish + b"}]" + self._end

    def _delta(self, delta: Delta) -> bytes:
        return _delta(delta)

    def _finish(self, answer: ChatAnswer) -> str:
        return answer.finish

    def last(self) -> bytes:
        if not self._include_usage:
            return DONE
        return self._head + b'],"usage":' + orjson.dumps(self._usage()) + b"}\n\n" + DONE

    def _usage(self) -> dict[str, Any]:
        return self._tally.usage(sum(answer.reasoning_tokens for answer in self._answers))

    def broken(self, error: ApiError) -> bytes:
        return b"data: " + orjson.dumps(error.body()) + b"\n\n" + DONE


def _delta(delta: Delta) -> bytes:
    if isinstance(delta, ContentDelta):
        return b'{"content":' + orjson.dumps(delta.text) + b"}"
    if isinstance(delta, ReasoningDelta):
        return b'{"reasoning_content":' + orjson.dumps(delta.text) + b"}"
    call: dict[str, Any] = {"index": delta.index, "function": {"arguments": delta.arguments}}
    if delta.id is not None:
        call = {"index": delta.index, "id": delta.id, "type": "function",
                "function": {"name": delta.name, "arguments": delta.arguments}}  # fmt: skip
    return orjson.dumps({"tool_calls": [call]})
