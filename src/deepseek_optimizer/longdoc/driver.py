"""Runs a strategy on an engine in this process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..chat.conversation import StopSignal
from ..engine.engine import Completion, Engine
from ..engine.request import Request, SamplingParams
from ..errors import BackendError
from .repetition import Watch
from .strategy_protocol import Ask, Batch, Reply, Result, Work, advance

Progress = Callable[[int, int], None]  # (prompt tokens processed, estimated total)


@dataclass(frozen=True)
class TokenUsage:
    """read: prompt tokens. cached: those of them that were in the prefix cache. generated: tokens of replies."""

    read: int = 0
    cached: int = 0
    generated: int = 0

    def plus(self, replies: list[Reply]) -> TokenUsage:
        return TokenUsage(
            self.read + sum(reply.read for reply in replies),
            self.cached + sum(reply.cached for reply in replies),
            self.generated + sum(reply.generated for reply in replies),
        )


class Driver:
    """
    Args:
        engine: returns the engine for prompts that fit the context, or (True) the one with a sliding window.
        grammar: compiles a JSON schema to a grammar.
        sampling: sampling parameters; length and grammar are set by the strategy.
    """

    def __init__(
        self, engine: Callable[[bool], Engine], grammar: Callable[[Mapping[str, Any]], Any], sampling: SamplingParams
    ) -> None:
        self._engine, self._grammar, self._sampling = engine, grammar, sampling
        self._ids = itertools.count(1)

    def run(self, work: Work, progress: Progress | None = None, stop: StopSignal | None = None) -> tuple[Result, TokenUsage]:
        """The result, and the tokens it took.

        Args:
            stop: when set, raises KeyboardInterrupt between two steps.

        Raises:
            RequestError: the strategy cannot perform the task, or a prompt does not fit.
            BackendError: the model failed.
        """
        tokens = TokenUsage()
        try:
            step = advance(work)
            while isinstance(step, Batch):
                replies = self._replies(step, tokens.read, progress, stop or StopSignal())
                tokens = tokens.plus(replies)
                step = advance(work, replies)
            return step, tokens
        finally:
            work.close()

    def _replies(self, batch: Batch, before: int, progress: Progress | None, stop: StopSignal) -> list[Reply]:
        windows = {ask.window for ask in batch.asks}
        if len(windows) != 1:
            raise ValueError("a batch must not be empty, and either all or none of its prompts use a window")
        engine = self._engine(windows.pop())
        requests = [self._request(ask) for ask in batch.asks]
        completions = {request.id: Completion() for request in requests}
        own = sum(len(ask.prompt) for ask in batch.asks)
        begun = engine.core.metrics.prompt_tokens
        watch = _Repetition(engine, requests)
        for outputs in engine.steps(requests):
            for output in outputs:
                completions[output.request_id].add(output)
                watch.look(output.request_id, completions[output.request_id])
            if stop.asked:
                raise KeyboardInterrupt
            if progress is not None:
                cached = sum(completion.cached_tokens for completion in completions.values())
                read = min(own, engine.core.metrics.prompt_tokens - begun + cached)
                progress(before + read, before + own + batch.left)
        return [_reply(completions[request.id], watch.ended.get(request.id)) for request in requests]

    def _request(self, ask: Ask) -> Request:
        grammar = None if ask.schema is None else self._grammar(ask.schema)
        sampling = replace(self._sampling, max_tokens=ask.max_tokens, grammar=grammar)
        return Request(ask.prompt, sampling, id=f"longdoc-{next(self._ids)}", pinned=ask.pinned)


class _Repetition:
    """Stops replies that repeat themselves; except those with a grammar, which would be left incomplete.

    Attributes:
        ended: request -> its text with the repeated passage once.
    """

    def __init__(self, engine: Engine, requests: list[Request]) -> None:
        self._engine, self.ended = engine, dict[str, str]()
        self._watches = {request.id: Watch() for request in requests if request.sampling.grammar is None}

    def look(self, request_id: str, completion: Completion) -> None:
        """Call it with the reply so far; it checks for repetition at intervals."""
        watch = self._watches.get(request_id)
        if watch is None or completion.finish is not None:
            return
        text = watch.first_time(completion.text, len(completion.token_ids))
        if text is not None:
            self.ended[request_id] = text
            self._engine.core.cancel(request_id)


def _reply(completion: Completion, once: str | None) -> Reply:
    if completion.finish == "error":
        raise BackendError(completion.error or "the engine stopped without an error message")
    return Reply(
        text=completion.text if once is None else once,
        complete=completion.finish == "stop",
        read=completion.prompt_tokens,
        cached=completion.cached_tokens,
        generated=len(completion.token_ids),
        dropped=completion.dropped_tokens,
        repeated=once is not None,
    )
