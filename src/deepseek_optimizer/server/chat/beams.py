"""Beam search, as vLLM's server does it (`beam_search` in vllm/entrypoints/openai/engine/serving.py): each step asks the engine
for the most likely next tokens of every beam. The beams' beginnings come from the prefix cache, so a step processes at most a
block of tokens per beam.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...engine.request import MAX_LOGPROBS, Finish, Output, Request, SamplingParams, TokenLogprob
from ..http.caller import Caller
from ..http.problems import ApiError
from ..protocol.sampling import Sampling
from ..state import ServerState
from ..tokens.tokenizing import Lane

MAX_BEAMS = MAX_LOGPROBS // 2


@dataclass(frozen=True)
class Beam:
    """A text of the search.

    Attributes:
        tokens: generated token ids.
        logprobs: of each token.
        total: sum of the tokens' log probabilities.
        finish: why it ended.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    total: float = 0.0
    finish: Finish = "length"

    def extended(self, reported: TokenLogprob, token: int, logprob: float) -> Beam:
        """This beam with one more token, one of the most likely ones of `reported`."""
        own = replace(reported, token=token, logprob=logprob)
        return Beam((*self.tokens, token), (*self.logprobs, own), self.total + logprob)

    def score(self, prompt: int, length_penalty: float) -> float:
        """vLLM's score: the sum of log probabilities, divided by the number of tokens of prompt and text, without an
        end-of-text token, to the power of the length penalty."""
        length = prompt + len(self.tokens) - (self.finish == "stop")
        return self.total / float(length**length_penalty)


class _EndedError(Exception):
    """A request of the search has failed; `output` is its last one."""

    def __init__(self, output: Output) -> None:
        super().__init__(output.error)
        self.output = output


class BeamSearch:
    """The search for one prompt.

    Args:
        state: the server's.
        request: with the prompt; its parameters give `max_tokens` and `ignore_eos`.
        width: number of beams.
        length_penalty: see `Beam.score`.
    """

    def __init__(self, state: ServerState, request: Request, width: int, length_penalty: float) -> None:
        self._state, self._request, self._width, self._penalty = state, request, width, length_penalty
        sampling = request.sampling
        self._max_tokens = min(state.settings.max_answer_tokens, state.engine.room - len(request.prompt))
        if sampling.max_tokens is not None:
            self._max_tokens = sampling.max_tokens
        self._eos: frozenset[int] = frozenset() if sampling.ignore_eos else state.engine.eos
        self._step = SamplingParams(temperature=0, max_tokens=1, logprobs=2 * width, ignore_eos=True)
        self.cached_tokens = 0

    async def run(self) -> list[Beam]:
        """Returns the best beams, best first."""
        if not self._max_tokens:
            return [Beam()] * self._width
        beams, ended = [Beam()], list[Beam]()
        for _ in range(self._max_tokens):
            nexts = await self._next_tokens(beams)
            longer = [
                beam.extended(reported, token, logprob)
                for beam, reported in zip(beams, nexts, strict=True)
                for token, logprob in reported.top
            ]
            ended += [replace(beam, finish="stop") for beam in longer if beam.tokens[-1] in self._eos]
            beams = self._best([beam for beam in longer if beam.tokens[-1] not in self._eos])
            if not beams:
                break
        return self._best(ended + beams)

    def _best(self, beams: Sequence[Beam]) -> list[Beam]:
        prompt = len(self._request.prompt)
        return sorted(beams, key=lambda beam: beam.score(prompt, self._penalty), reverse=True)[: self._width]

    async def _next_tokens(self, beams: Sequence[Beam]) -> list[TokenLogprob]:
        """The most likely next tokens of each beam.

        Raises:
            _EndedError: a request failed.
        """
        answers = self._state.submit([self._continued(beam) for beam in beams])
        try:
            outputs = [await _last(answer) for answer in answers]
        finally:
            for answer in answers:
                answer.cancel()
        if not beams[0].tokens:
            self.cached_tokens = outputs[0].cached_tokens
        reported = []
        for output in outputs:
            if not output.logprobs:
                raise _EndedError(output)
            reported.append(output.logprobs[0])
        return reported

    def _continued(self, beam: Beam) -> Request:
        """The request for the next token of a beam."""
        request, pictures = self._request, self._request.pictures
        return replace(
            request,
            prompt=[*request.prompt, *beam.tokens],
            pictures=None if pictures is None else pictures.followed_by(len(beam.tokens)),
            sampling=self._step,
        )


async def _last(answer: Any) -> Output:
    """The last output of an answer of the engine, with the log probabilities of its token."""
    outputs = [output async for output in answer]
    last: Output = outputs[-1]
    return replace(last, logprobs=outputs[0].logprobs)


class BeamAnswer:
    """One of the texts of a search, in the interface of `Answers`, with a single output.

    Args:
        search: the running search; returns the outputs of all its answers.
        index: of the text among these.
    """

    def __init__(self, search: asyncio.Future[list[Output]], index: int) -> None:
        self._search, self._index, self._ended = search, index, False

    def __aiter__(self) -> AsyncIterator[Output]:
        return self

    async def __anext__(self) -> Output:
        if self._ended:
            raise StopAsyncIteration
        self._ended = True
        return (await self._search)[self._index]

    def cancel(self) -> None:
        """Ends the search."""
        self._search.cancel()

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once the search has ended."""
        self._search.add_done_callback(lambda _: callback())


def beam_start(
    state: ServerState, body: Sampling, n: int, caller: Caller
) -> Callable[[list[Request]], list[BeamAnswer]] | None:
    """A function that starts beam searches instead of plain answers; None: the request does not ask for beam search. It takes
    `n` requests for each prompt, and returns an answer for each.

    Args:
        state: the server's.
        body: the request.
        n: number of beams, and of answers to each prompt.
        caller: who sent the request.

    Raises:
        ApiError: 400, too many beams, or fields that beam search does not support.
    """
    if not body.use_beam_search:
        return None
    if n > MAX_BEAMS:
        raise ApiError(400, f"n: at most {MAX_BEAMS} with use_beam_search", param="n")
    if body.stream or body.stop or body.stop_token_ids or body.prompt_logprobs is not None:
        raise ApiError(400, "use_beam_search: not with stream, stop or prompt_logprobs", param="use_beam_search")
    penalty = 1.0 if body.length_penalty is None else body.length_penalty

    def start(requests: list[Request]) -> list[BeamAnswer]:
        answers: list[BeamAnswer] = []
        for request in requests[::n]:
            if request.sampling.grammar is not None or request.prompt_logprobs is not None:
                raise ApiError(
                    400, "use_beam_search: not with structured output, tools or echo with logprobs", param="use_beam_search"
                )
            if len(request.prompt) + (request.sampling.max_tokens or 1) > state.engine.room:
                raise ApiError(400, "prompt: does not fit the context together with max_tokens; shorten it", param="prompt")
            search = asyncio.ensure_future(_outputs(state, request, n, penalty, caller))
            answers += [BeamAnswer(search, index) for index in range(n)]
        return answers

    return start


async def _outputs(state: ServerState, request: Request, width: int, length_penalty: float, caller: Caller) -> list[Output]:
    """Runs a search; returns its outputs, best first. If it failed, all are the output of the request that failed."""
    search, sampling = BeamSearch(state, request, width, length_penalty), request.sampling
    try:
        beams = await search.run()
    except _EndedError as error:
        return [error.output] * width

    def texts(lane: Lane) -> list[str]:
        written = [beam.tokens[:-1] if beam.finish == "stop" else beam.tokens for beam in beams]
        return [lane.tokenizer.decode(tokens, skip_special_tokens=sampling.skip_special_tokens) for tokens in written]

    return [
        Output(
            request.id,
            list(beam.tokens),
            text,
            None if sampling.logprobs is None else [replace(one, top=one.top[: sampling.logprobs]) for one in beam.logprobs],
            beam.finish,
            prompt_tokens=len(request.prompt),
            cached_tokens=search.cached_tokens,
            completion_tokens=len(beam.tokens),
        )
        for beam, text in zip(beams, await state.tokenizing(texts, caller), strict=True)
    ]
