"""Answers to texts: the engine's outputs are written as JSON or events of /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from ...engine.request import Output, TokenLogprob
from ..http.problems import ApiError
from ..tokens.token_text import TokenTexts, completion_logprobs
from .chat_answers import DONE, UNFINISHED
from .reports import Report
from .usage import Tally


class CompletionCollector:
    """Collects whole answers into a `text_completion`.

    Args:
        head: fields that are known in advance.
        echoes: text before each answer.
        n: answers to each prompt.
        texts: of the model's tokens; None: no log probabilities.
        reports: of each answer; empty: none.
        returned: number of answers to each prompt to return: those with the highest mean log probability; None: all.
    """

    def __init__(
        self,
        head: dict[str, Any],
        echoes: list[str],
        n: int,
        texts: TokenTexts | None = None,
        reports: Sequence[Report] = (),
        returned: int | None = None,
    ) -> None:
        self._n, self._returned = n, n if returned is None else returned
        self._head, self._echoes, self._texts, self._reports = head, echoes, texts, reports
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
        for place, index in enumerate(self._best()):
            parts = self._parts[index]
            end, logprobs = self._ends[index], None
            if self._texts is not None:
                offset = len(self._echoes[index])
                logprobs, _ = completion_logprobs(self._logprobs[index], self._texts, offset)
            choice: dict[str, Any] = {
                "index": place, "text": "".join(parts), "logprobs": logprobs, "finish_reason": end and end.finish,
                "stop_reason": end and end.stop_reason, "prompt_logprobs": None, "prompt_token_ids": None, "token_ids": None,
            }  # fmt: skip
            if self._reports:
                report = self._reports[index]
                choice |= {"logprobs": logprobs and report.with_prompt(logprobs), **report.of_prompt(), **report.of_answer()}
            choices.append(choice)
        return {**self._head, "object": "text_completion", "choices": choices, "usage": self._tally.usage()}

    def _best(self) -> list[int]:
        """The answers to return."""
        indices = range(len(self._parts))
        if self._returned == self._n:
            return list(indices)

        def mean(index: int) -> float:
            values = [one.logprob for one in self._logprobs[index]]
            return sum(values) / len(values) if values else float("-inf")

        groups = [indices[first : first + self._n] for first in indices[:: self._n]]
        return [index for group in groups for index in sorted(group, key=mean, reverse=True)[: self._returned]]


class CompletionEncoder:
    """Writes answers as chunks, `data: {...}`. Arguments as those of `CompletionCollector` and `ChatEncoder`."""

    def __init__(
        self,
        head: dict[str, Any],
        echoes: list[str],
        n: int,
        include_usage: bool,
        texts: TokenTexts | None = None,
        continuous_usage: bool = False,
        reports: Sequence[Report] = (),
    ) -> None:
        self._echoes, self._texts, self._include_usage = list(echoes), texts, include_usage
        self._continuous_usage = continuous_usage
        self._reports, self._begun = reports, [False] * len(echoes)
        self._offsets = [len(echo) for echo in echoes]
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
        if output.finish is None and not output.logprobs and not text:
            return b""
        opening = self._openings[index] + orjson.dumps(text) + self._reported(index)
        if output.finish is None and not output.logprobs:
            return opening + self._close
        logprobs = b"null"
        if self._texts is not None and (output.logprobs or output.prompt_logprobs is not None):
            values, self._offsets[index] = completion_logprobs(output.logprobs or [], self._texts, self._offsets[index])
            if output.prompt_logprobs is not None:
                values = self._reports[index].with_prompt(values)
            logprobs = orjson.dumps(values)
        end = b',"finish_reason":%b,"stop_reason":%b}]' % (orjson.dumps(output.finish), orjson.dumps(output.stop_reason))
        return opening + b',"logprobs":' + logprobs + end + self._end

    def progressed(self, index: int) -> bytes:
        """A chunk without text, for the progress of the prompt."""
        return self._openings[index] + b'""' + self._close

    def _reported(self, index: int) -> bytes:
        """The fields of the answer's report in a chunk, each after a comma."""
        if not self._reports:
            return b""
        report, begun = self._reports[index], self._begun[index]
        self._begun[index] = True
        fields = (b"" if begun else report.chunk_of_prompt(), report.chunk_of_answer())
        return b"".join(b"," + field for field in fields if field)

    def last(self) -> bytes:
        if not self._include_usage:
            return DONE
        return self._head + b'],"usage":' + orjson.dumps(self._tally.usage()) + b"}\n\n" + DONE

    def broken(self, error: ApiError) -> bytes:
        return b"data: " + orjson.dumps(error.body()) + b"\n\n" + DONE
