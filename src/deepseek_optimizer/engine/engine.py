"""`Engine`: synchronous batch inference over `EngineCore`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from ..backends.qualities import Quality
from .adapters import adapters_of
from .core import EngineCore
from .prompt_logprobs import PromptLogprobs
from .request import Finish, Output, Request, SamplingParams, TokenLogprob, check_text


@dataclass
class Completion:
    """The complete result of a request.

    Attributes:
        text: generated text.
        token_ids: generated token ids.
        logprobs, finish, stop_reason, error: as in `Output`.
        prompt_tokens, cached_tokens, dropped_tokens: as in `Output`, at the end.
        embedding, scores: as in `Output`, for requests that read a prompt instead of generating text.
        prompt_logprobs: as in `Output`, for requests with `prompt_logprobs`.
        quality: as in `Output`.
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
    scores: Any = None
    error: str | None = None
    prompt_logprobs: PromptLogprobs | None = None
    quality: Quality | None = None

    def add(self, output: Output) -> None:
        """Adds the output of a step."""
        self.text += output.text
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + output.logprobs
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.finish, self.stop_reason, self.error = output.finish, output.stop_reason, output.error
        self.prompt_tokens, self.cached_tokens = output.prompt_tokens, output.cached_tokens
        self.dropped_tokens, self.embedding, self.scores = output.dropped_tokens, output.embedding, output.scores
        self.quality = output.quality


class Engine:
    """Runs requests on the caller's thread. Not thread-safe; use `AsyncEngine` for concurrent callers.

    Args:
        core: an engine core that nothing else uses.
        running: returns a context manager that is active during each step, such as the backend's thread settings.
    """

    def __init__(self, core: EngineCore, running: Any = nullcontext) -> None:
        self.core, self._running = core, running
        self._number = 0

    @property
    def tokenizer(self) -> Any:
        return self.core.tokenizer

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Loads a LoRA adapter, which requests can then choose by `Request.adapter`.

        Args:
            name: its name.
            path: a directory as PEFT writes it.

        Raises:
            RequestError, AdapterError, CheckpointError, NotEnoughMemoryError: see `Adapters.load`.
        """
        adapters_of(self.core).load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Unloads a LoRA adapter. Raises RequestError if there is none of this name."""
        adapters_of(self.core).unload(name)

    def generate(
        self, prompts: Sequence[str | list[int] | Request], sampling: SamplingParams | None = None
    ) -> list[Completion]:
        """Generates completions for all prompts, in one batch as far as they fit.

        Args:
            prompts: texts without a template (render chats with `tokenizer.apply_chat_template`), lists of token ids, or
                requests.
            sampling: parameters for prompts that are not requests; None: the defaults.

        Returns: completions in the order of the prompts.

        Raises:
            RequestError: a prompt cannot be served; nothing was run.
        """
        requests = [self._request(prompt, sampling or SamplingParams()) for prompt in prompts]
        completions = {request.id: Completion() for request in requests}
        self.core.unwatched = True
        try:
            for outputs in self.steps(requests):
                for output in outputs:
                    completions[output.request_id].add(output)
        finally:
            self.core.unwatched = False
        return [completions[request.id] for request in requests]

    def stream(self, prompt: str | list[int] | Request, sampling: SamplingParams | None = None) -> Iterator[Output]:
        """Yields the outputs of one request as they are generated; closing the iterator cancels the request.

        Args:
            prompt: a text, a list of token ids, or a request.
            sampling: parameters for a prompt that is not a request; None: the defaults.

        Raises:
            RequestError: the prompt cannot be served; nothing was run.
        """
        for outputs in self.steps([self._request(prompt, sampling or SamplingParams())]):
            yield from outputs

    def steps(self, requests: Sequence[Request]) -> Iterator[list[Output]]:
        """Runs requests and yields the outputs of each step until all have ended.

        The list is empty for a step that only processed prompts. Closing the iterator cancels the remaining requests.

        Args:
            requests: requests with distinct ids.

        Raises:
            RequestError: a request cannot be served; nothing was run.
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

    def close(self) -> None:
        """Writes the rest of the prefix cache to `prefix_cache_dir`, if that is set. The engine must not be used afterwards."""
        self.core.scheduler.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

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
