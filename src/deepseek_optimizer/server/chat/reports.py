"""What an answer reports besides its text: log probabilities of the prompt's tokens, and token ids.

A prompt may have hundreds of thousands of log probabilities, so they are converted to JSON on a thread.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from ...engine.prompt_logprobs import PromptLogprobs
from ...engine.request import Output, Request
from ..http.caller import Caller
from ..http.problems import ApiError
from ..protocol.reports import Reports
from ..state import ServerState
from ..tokens.token_text import TokenTexts, echo_logprobs, prompt_logprob_list

MAX_VALUES = 1 << 18  # log probabilities of prompt tokens in one response
_BYTES = 16  # of a request's text that take as long to tokenize as one log probability takes to convert


@dataclass(frozen=True)
class Wanted:
    """The reports that a request asks for.

    Attributes:
        listed: `prompt_logprobs` of the request; None: the field is omitted.
        echoed: number of most likely tokens of prompt tokens in the `logprobs` of /v1/completions with `echo`; None: it has no
            prompt tokens.
        token_ids: whether to return token ids.
    """

    listed: int | None
    echoed: int | None
    token_ids: bool

    @property
    def prompt_logprobs(self) -> int | None:
        """See `Request.prompt_logprobs`."""
        counts = [count for count in (self.listed, self.echoed) if count is not None]
        return max(counts, default=None)


def wanted_reports(body: Reports, prompts: Sequence[Sequence[int]], n: int, stream: bool, echoed: int | None = None) -> Wanted:
    """Checks and returns the reports that a request asks for.

    Args:
        body: the request.
        prompts: token ids of its prompts.
        n: answers to each prompt.
        stream: whether the answers are streamed.
        echoed: see `Wanted`.

    Raises:
        ApiError: 400, too many log probabilities for one response, or `prompt_logprobs` in a stream.
    """
    if body.prompt_logprobs is not None and stream:
        raise ApiError(400, "prompt_logprobs: not available with stream; leave stream out", param="prompt_logprobs")
    wanted = Wanted(body.prompt_logprobs, echoed, bool(body.return_token_ids))
    if (top := wanted.prompt_logprobs) is not None:
        values = n * (1 + top) * sum(len(prompt) - 1 for prompt in prompts)
        if values > MAX_VALUES:
            field = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
            raise ApiError(
                400,
                f"{field}: the prompts have {values:,} log probabilities, but a response has at most {MAX_VALUES:,}; "
                "send fewer or shorter prompts, or ask for fewer tokens",
                param=field,
            )
    return wanted


class Report:
    """The reports of one answer.

    Args:
        wanted: what is reported.
        prompt: token ids.
        echo: text before the answer.
        texts: of the model's tokens.
    """

    def __init__(self, wanted: Wanted, prompt: list[int], echo: str, texts: TokenTexts) -> None:
        self._wanted, self._prompt, self._echo, self._texts = wanted, prompt, echo, texts
        self._token_ids: list[int] = []
        self._streamed = 0  # number of token ids in chunks so far
        self._listed = orjson.Fragment(b"null")
        self._echoed: dict[str, bytes] = {}

    def add(self, output: Output) -> None:
        self._token_ids += output.token_ids

    def convert(self, logprobs: PromptLogprobs) -> None:
        """Converts log probabilities of the prompt to JSON. Slow: to be called on a thread."""
        if self._wanted.listed is not None:
            values = prompt_logprob_list(logprobs, self._texts, self._wanted.listed)
            self._listed = orjson.Fragment(orjson.dumps(values))
        if self._wanted.echoed is not None:
            arrays = echo_logprobs(self._prompt[0], logprobs, self._texts, self._echo, self._wanted.echoed)
            self._echoed = {name: orjson.dumps(values)[1:-1] for name, values in arrays.items()}

    def with_prompt(self, logprobs: dict[str, Any]) -> dict[str, Any]:
        """`logprobs` of /v1/completions with the prompt's tokens before those of the answer."""
        if not self._echoed:
            return logprobs
        merged: dict[str, Any] = {}
        for name, values in logprobs.items():
            parts = [self._echoed.get(name, b""), orjson.dumps(values)[1:-1]]
            merged[name] = None if values is None else orjson.Fragment(b"[" + b",".join(filter(None, parts)) + b"]")
        return merged

    def of_prompt(self) -> dict[str, Any]:
        """The fields of the prompt in a whole response."""
        fields: dict[str, Any] = {}
        if self._wanted.listed is not None:
            fields["prompt_logprobs"] = self._listed
        if self._wanted.token_ids:
            fields["prompt_token_ids"] = self._prompt
        return fields

    def of_answer(self) -> dict[str, Any]:
        """The fields of the answer in a whole response."""
        return {"token_ids": self._token_ids} if self._wanted.token_ids else {}

    def chunk_of_prompt(self) -> bytes:
        """The fields of the prompt in the first chunk of a stream."""
        return b'"prompt_token_ids":' + orjson.dumps(self._prompt) if self._wanted.token_ids else b""

    def chunk_of_answer(self) -> bytes:
        """The fields of the answer in a chunk of a stream: token ids since the last chunk."""
        if not self._wanted.token_ids:
            return b""
        new, self._streamed = self._token_ids[self._streamed :], len(self._token_ids)
        return b'"token_ids":' + orjson.dumps(new)


class ReportedAnswers:
    """Answers of the engine that fill a report before each output is returned.

    Args:
        answers: the engine's.
        report: to fill.
        convert: runs `Report.convert` on a thread.
    """

    def __init__(self, answers: Any, report: Report, convert: Callable[[Report, PromptLogprobs], Any]) -> None:
        self._answers, self._report, self._convert = answers, report, convert

    def __aiter__(self) -> AsyncIterator[Output]:
        return self

    async def __anext__(self) -> Output:
        output: Output = await self._answers.__anext__()
        self._report.add(output)
        if output.prompt_logprobs is not None:
            await self._convert(self._report, output.prompt_logprobs)
        return output

    def cancel(self) -> None:
        """See `Answers.cancel`."""
        self._answers.cancel()

    def when_ended(self, callback: Callable[[], None]) -> None:
        """See `Answers.when_ended`."""
        self._answers.when_ended(callback)


def reported(
    state: ServerState,
    answers: list[Any],
    requests: Sequence[Request],
    wanted: Wanted,
    caller: Caller,
    texts: TokenTexts,
    echoes: Sequence[str] = (),
) -> tuple[list[Any], list[Report]]:
    """Answers of the engine with their reports.

    Args:
        state: the server's.
        answers: the engine's.
        requests: one for each answer.
        wanted: what is reported.
        caller: who sent the request.
        texts: of the model's tokens.
        echoes: text before each answer; empty: none.

    Returns: the answers to read instead, and a report for each; no reports if the request asks for none.
    """
    if wanted == Wanted(None, None, False):
        return answers, []

    async def convert(report: Report, logprobs: PromptLogprobs) -> None:
        size = _BYTES * len(logprobs) * (1 + logprobs.top_tokens.shape[1])
        await state.tokenizing(lambda _: report.convert(logprobs), caller, size)

    given = echoes or [""] * len(requests)
    reports = [Report(wanted, request.prompt, echo, texts) for request, echo in zip(requests, given, strict=True)]
    return [ReportedAnswers(one, report, convert) for one, report in zip(answers, reports, strict=True)], reports
