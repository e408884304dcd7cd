"""Answers to texts: the engine's outputs are written as JSON or events of /v1/completions."""

from __future__ import annotations

from typing import Any

import orjson

from ...engine.request import Output, TokenLogprob
from ..http.problems import ApiError
from ..tokens.token_text import TokenTexts, completion_logprobs
from .chat_answers import DONE, UNFINISHED
from .usage import Tally


class CompletionCollector:
    """Collects whole answers into a `text_completion`.

    Args:
        head: fields that are known in advance.
        echoes: text before each answer.
        n: answers to each prompt.
        texts: of the model's tokens; None: no log probabilities.
        logprobs: number of most likely tokens; None: no log probabilities.
    """

    def __init__(
        self, head: dict[str, Any], echoes: list[str], n: int, texts: TokenTexts | None = None, logprobs: int | None = None
    ) -> None:
        self._head, self._echoes, self._texts, self._top = head, echoes, texts, logprobs
        self._parts: list[list[str]] = [[echo] for echo in echoes]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in echoes]
        self._ends: list[Output | None] = [None] * len(echoes)
        self._tally = Tally(len(echoes), n)

    def feed(self, index: int, output: Output) -> None:
        self._parts[index].append(output.text)
        self._logprobs[index] += output.logprobs or ()
        self._ends[index] = output
        self._tally.add(index, output)

    def body(self) -> dict[str, Any]:
        choices = []
        for index, parts in enumerate(self._parts):
            end, logprobs = self._ends[index], None
            if self._texts is not None:
                logprobs, _ = completion_logprobs(self._logprobs[index], self._texts, 0, self._top or 0)
            choices.append(
                {"index": index, "text": "".join(parts), "logprobs": logprobs, "finish_reason": end and end.finish,
                 "stop_reason": end and end.stop_reason}
            )  # fmt: skip
        return {**self._head, "object": "text_completion", "choices": choices, "usage": self._tally.usage()}


class CompletionEncoder:
    """Writes answers as chunks, `data: {...}`. Arguments as those of `CompletionCollector` and `ChatEncoder`."""

    def __init__(
        self,
        head: dict[str, Any],
        echoes: list[str],
        n: int,
        include_usage: bool,
        texts: TokenTexts | None = None,
        logprobs: int | None = None,
        continuous_usage: bool = False,
    ) -> None:
        self._echoes, self._texts, self._top, self._include_usage = list(echoes), texts, logprobs, include_usage
        self._continuous_usage = continuous_usage
        self._offsets = [0] * len(echoes)
        self._tally = Tally(len(echoes), n)
        self._head = b"data: " + orjson.dumps({**head, "object": "text_completion"})[:-1] + b',"choices":['
        self._openings = [self._head + b'{"index":%d,"text":' % index for index in range(len(echoes))]
        self._end = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._close = UNFINISHED + self._end

    def feed(self, index: int, output: Output) -> bytes:
        self._tally.add(index, output)
        if self._continuous_usage:
            self._end = b',"usage":' + orjson.dumps(self._tally.usage()) + b"}\n\n"
            self._close = UNFINISHED + self._end
        text = output.text
        if self._echoes[index]:
            text, self._echoes[index] = self._echoes[index] + text, ""
        if output.finish is None and not output.logprobs:
            return self._openings[index] + orjson.dumps(text) + self._close if text else b""
        logprobs = b"null"
        if output.logprobs and self._texts is not None:
            values, self._offsets[index] = completion_logprobs(
                output.logprobs, self._texts, self._offsets[index], self._top or 0
            )
            logprobs = orjson.dumps(values)
        end = b',"finish_reason":%b,"stop_reason":%b}]' % (orjson.dumps(output.finish), orjson.dumps(output.stop_reason))
        return self._openings[index] + orjson.dumps(text) + b',"logprobs":' + logprobs + end + self._end

    def last(self) -> bytes:
        if not self._include_usage:
            return DONE
        return self._head + b'],"usage":' + orjson.dumps(self._tally.usage()) + b"}\n\n" + DONE

    def broken(self, error: ApiError) -> bytes:
        return b"data: " + orjson.dumps(error.body()) + b"\n\n" + DONE
