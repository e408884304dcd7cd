"""`Engine`: many requests at once, for programs that want all answers. The synchronous face of `core`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from .core import EngineCore
from .request import Finish, Output, Request, SamplingParams, TokenLogprob, check_text


@dataclass
class Completion:
    """A whole answer.

    Attributes:
        finish, stop_reason, error: as in `Output`.
        embedding: of requests with `embed`.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish: Finish | None = None
    stop_reason: str | int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    dropped_tokens: int = 0
    embedding: Any = None
    error: str | None = None

    def add(self, output: Output) -> None:
        """Takes in what a step brought."""
        self.text += output.text
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + output.logprobs
        self.finish, self.stop_reason, self.error = output.finish, output.stop_reason, output.error
        self.prompt_tokens, self.cached_tokens = output.prompt_tokens, output.cached_tokens
        self.dropped_tokens, self.embedding = output.dropped_tokens, output.embedding


class Engine:
    """Runs on the caller's thread. For one thread at a time; `AsyncEngine` is for many.

    Args:
        core: with nothing in it that others would wait for.
        running: what is entered while steps run: the backend's arrangements with torch's threads.
    """

    def __init__(self, core: EngineCore, running: Any = nullcontext) -> None:
        self.core, self._running = core, running
        self._number = 0

    @property
    def tokenizer(self) -> Any:
        return self.core.tokenizer

    def generate(
        self, prompts: Sequence[str | list[int] | Request], sampling: SamplingParams | None = None
    ) -> list[Completion]:
        """All answers, in the prompts' order.

        Args:
            prompts: texts, as they are (a chat is rendered by `tokenizer.apply_chat_template`), token ids, or requests.
            sampling: of prompts that bring none of their own.

        Raises:
            RequestError: a prompt cannot be served; nothing was run.
        """
        requests = [self._request(prompt, sampling or SamplingParams()) for prompt in prompts]
        found = {request.id: Completion() for request in requests}
        for outputs in self.steps(requests):
            for output in outputs:
                found[output.request_id].add(output)
        return [found[request.id] for request in requests]

    def stream(self, prompt: str | list[int] | Request, sampling: SamplingParams | None = None) -> Iterator[Output]:
        """One answer as it comes; leaving the loop ends it."""
        for outputs in self.steps([self._request(prompt, sampling or SamplingParams())]):
            yield from outputs

    def steps(self, requests: Sequence[Request]) -> Iterator[list[Output]]:
        """What each step brings, until all have ended; nothing where it only read prompts. Leaving the loop ends them.

        Args:
            requests: with ids, no two alike.

        Raises:
            RequestError: one cannot be served; nothing was run.
        """
        for request in requests:
            self.core.check(request)
        waiting = {request.id for request in requests}
        for request in requests:
            self.core.add(request)
        try:
            while waiting:
                with self._entered():
                    outputs = self.core.step()
                waiting -= {output.request_id for output in outputs if output.finish is not None}
                yield outputs
        finally:
            for request_id in waiting:
                self.core.cancel(request_id)
            if waiting:
                self.core.step()

    def _entered(self) -> AbstractContextManager[Any]:
        entered: AbstractContextManager[Any] = self._running()
        return entered

    def _request(self, prompt: str | list[int] | Request, sampling: SamplingParams) -> Request:
        self._number += 1
        if isinstance(prompt, Request):
            return prompt if prompt.id else replace(prompt, id=f"request-{self._number}")
        if isinstance(prompt, str):
            check_text("prompt", prompt)
        if isinstance(prompt, str):
            check_text("prompt", prompt)
        tokens = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        return Request(tokens, sampling, id=f"request-{self._number}")
