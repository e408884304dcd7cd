"""An engine without a model: the interface of `AsyncEngine` that the server uses, with scripted texts. For tests of
protocols."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from prometheus_client import CollectorRegistry

from deepseek_optimizer.engine.async_engine import Admission, Answers
from deepseek_optimizer.engine.detokenizer import Detokenizer
from deepseek_optimizer.engine.metrics import EngineMetrics
from deepseek_optimizer.engine.prompt_logprobs import PromptLogprobs
from deepseek_optimizer.engine.request import Finish, Output, Request, TokenLogprob, check_tokens
from deepseek_optimizer.engine.running import RequestProgress
from deepseek_optimizer.errors import ContextLengthError, EngineBusyError, EngineDeadError, RequestError

HIDDEN = 8


def default_script(request: Request) -> str:
    """A text that depends only on the prompt and the seed, with characters of several tokens."""
    digest = hashlib.sha256(repr((request.prompt, request.sampling.seed)).encode()).hexdigest()
    return f"Answer {digest[:8]}: naïve 😀 中文 {digest[8:16]}"


class FakeEngine:
    """
    Args:
        tokenizer: a tokenizer of Transformers.
        script: returns the text that answers a request; an end of text follows.
        capacity: maximum number of admitted requests.
        context: maximum tokens of prompt and answer.
        step_seconds: duration of a step, which generates one token for every request.
    """

    def __init__(
        self,
        tokenizer,
        script: Callable[[Request], str] = default_script,
        *,
        capacity: int = 64,
        context: int = 4096,
        step_seconds: float = 0.0,
        model_name: str = "fake-model",
    ):
        self.tokenizer, self.script, self.capacity, self.context = tokenizer, script, capacity, context
        self.model_name, self.step_seconds, self.vocab_size = model_name, step_seconds, len(tokenizer)
        self.generates, self.hidden_size, self.classifier = True, HIDDEN, None
        self.eos = frozenset({tokenizer.eos_token_id})
        self.cache_window: int | None = None
        self.picture_encoder = None
        self.adapters: list[SimpleNamespace] = []
        self.room = context
        self.max_running = capacity
        self.registry, self.metrics, self.drafted = CollectorRegistry(), EngineMetrics(), (0, 0, 0)
        self.alive = False
        self.steps = 0
        self.seen: list[Request] = []
        self.ended: list[Finish] = []
        self.max_pending = 0  # maximum number of tokens in an output that no client had read yet
        self._admitted, self._draining = 0, False
        self._ids = itertools.count(1)
        self._running: dict[str, _Sequence] = {}
        self._task: asyncio.Task | None = None
        self._wake: asyncio.Event | None = None
        self.frozen = False  # no steps

    async def start(self):
        self.alive, self._wake = True, asyncio.Event()
        self._task = asyncio.ensure_future(self._run())

    async def close(self):
        self.alive = False
        self._task.cancel()
        for sequence in list(self._running.values()):
            self._end(sequence, "cancelled")

    @property
    def running(self) -> int:
        return len(self._running)

    def running_requests(self) -> list[RequestProgress]:
        return [s.progress_of(number) for number, s in enumerate(self._running.values(), 1)]

    @property
    def load(self) -> tuple[int, int]:
        return len(self._running), 0

    async def sleep(self, seconds: float) -> None:
        await self.drain(seconds)

    def wake_up(self) -> None:
        self._draining = False

    @property
    def admitted(self) -> int:
        return self._admitted

    def admit(self, requests: int = 1, client: str = "") -> Admission:
        self.check_alive()
        if self._draining or self._admitted + requests > self.capacity:
            raise EngineBusyError(self._admitted, 2.0)
        self._admitted += requests
        return Admission(self, requests, client)

    def left(self, requests: int, client: str) -> None:
        self._admitted -= requests

    def submit(self, request: Request) -> Answers:
        self.check_alive()
        if len(request.prompt) > self.context - (not request.embed):
            message = f"{len(request.prompt)} tokens, and the context has {self.context}"
            raise ContextLengthError("prompt", message, len(request.prompt), self.context)
        check_tokens(request, self.vocab_size)
        request = replace(request, id=f"{request.id or 'request'}-{next(self._ids)}")
        answers = Answers(self, request)
        self.seen.append(request)
        self._running[request.id] = _Sequence(self, request, answers)
        self._wake.set()
        return answers

    def load_adapter(self, name: str, path: object, replace: bool = False) -> None:
        if replace:
            self.adapters = [adapter for adapter in self.adapters if adapter.name != name]
        if any(adapter.name == name for adapter in self.adapters):
            raise RequestError("lora_name", f"{name!r} has already been loaded; unload it first")
        self.adapters.append(SimpleNamespace(name=name, path=path, created=1))

    def unload_adapter(self, name: str) -> None:
        if all(adapter.name != name for adapter in self.adapters):
            raise RequestError("lora_name", f"there is no adapter {name!r}")
        self.adapters = [adapter for adapter in self.adapters if adapter.name != name]

    def cancel(self, request_id: str) -> None:
        if request_id in self._running:
            self._running[request_id].cancelled = True
            self._wake.set()

    async def drain(self, seconds: float) -> bool:
        self._draining = True
        until = time.monotonic() + seconds
        while self._admitted and time.monotonic() < until:
            await asyncio.sleep(0.01)
        for request_id in list(self._running):
            self.cancel(request_id)
        return not self._running

    def die(self):
        """Simulates an error that ends the engine's thread."""
        self.alive = False
        self._task.cancel()
        for sequence in list(self._running.values()):
            self._end(sequence, "error", "the engine has stopped: /secret/path")

    def fail(self):
        """Fails the oldest running request; the engine continues."""
        self._end(next(iter(self._running.values())), "error", "NaN at /secret/path")

    def tell_of_replaced_files(self):
        pass

    def check_alive(self):
        if not self.alive:
            raise EngineDeadError("dead")

    async def _run(self):
        while True:
            if not self._running or (self.frozen and not any(s.cancelled or s.late for s in self._running.values())):
                self._wake.clear()
                try:
                    await asyncio.wait_for(self._wake.wait(), 0.01)
                except (TimeoutError, asyncio.TimeoutError):
                    continue
            self.steps += 1
            await asyncio.sleep(self.step_seconds)
            for sequence in list(self._running.values()):
                if sequence.cancelled:
                    self._end(sequence, "cancelled")
                elif sequence.late:
                    self._end(sequence, "deadline")
                elif not self.frozen:
                    sequence.step()

    def _end(self, sequence: _Sequence, finish: Finish, error: str | None = None):
        sequence.put(Output(sequence.request.id, finish=finish, error=error))

    def ended_(self, sequence: _Sequence, finish: Finish):
        self._running.pop(sequence.request.id, None)
        self.ended.append(finish)


class _Sequence:
    def __init__(self, engine: FakeEngine, request: Request, answers: Answers):
        self.engine, self.request, self.answers = engine, request, answers
        self.cancelled = False
        sampling = request.sampling
        text = "" if request.embed else engine.script(request)
        self.script = engine.tokenizer(text, add_special_tokens=False)["input_ids"] + [engine.tokenizer.eos_token_id]
        self.at = 0
        self.progress: tuple[int, ...] = ()
        self.detokenizer = Detokenizer(
            engine.tokenizer,
            sampling.stop,
            include_stop=sampling.include_stop,
            skip_special_tokens=sampling.skip_special_tokens,
        )
        self.grammar = sampling.grammar.start() if sampling.grammar else None
        self.bits = np.full((engine.vocab_size + 31) // 32, -1, np.int32)

    def progress_of(self, number: int) -> RequestProgress:
        return RequestProgress(number, len(self.request.prompt), self.at, self.request.sampling.max_tokens or 0)

    @property
    def late(self) -> bool:
        return self.request.deadline is not None and time.monotonic() > self.request.deadline

    def put(self, output: Output):
        output.prompt_tokens, output.completion_tokens = len(self.request.prompt), self.at
        if output.finish is not None:
            self.engine.ended_(self, output.finish)
        self.answers.put(output)
        self.engine.max_pending = max(self.engine.max_pending, len(self.answers._pending.token_ids))

    def step(self):
        if self.request.scored_tokens:  # in favor of prompts with many "y"
            ids = np.array(self.request.prompt)
            liked = float((ids == self.engine.tokenizer.convert_tokens_to_ids("y")).sum())
            return self.put(Output(self.request.id, finish="stop", scores=np.array([liked, 0], np.float32)))
        if self.request.embed:
            vector = np.arange(HIDDEN, dtype=np.float32) + sum(self.request.prompt) / 1000
            return self.put(Output(self.request.id, finish="stop", embedding=vector))
        if self.request.progress and not self.at and not self.progress:  # the prompt takes two steps
            size = len(self.request.prompt)
            self.progress = (size,)
            return self.put(Output(self.request.id, progress=(0, size // 2)))
        progress, self.progress = self.progress, ()
        sampling = self.request.sampling
        prompt_logprobs = None if self.at else self._prompt_logprobs()
        if sampling.max_tokens == 0:
            return self.put(Output(self.request.id, finish="length", prompt_logprobs=prompt_logprobs))
        token = self._choose()
        self.at += 1
        text, stop = ("", None) if token in sampling.stop_token_ids else self.detokenizer.add(token)
        finish, reason = None, None
        if stop is not None:
            finish, reason = "stop", stop
        elif token in sampling.stop_token_ids:
            finish, reason = "stop", token
        elif token == self.engine.tokenizer.eos_token_id and not sampling.ignore_eos:
            finish = "stop"
        elif self.at == sampling.max_tokens or len(self.request.prompt) + self.at >= self.engine.context:
            finish = "length"
        if finish is not None and stop is None:
            text += self.detokenizer.end()
        logprobs = None
        if sampling.logprobs is not None:
            top = tuple(((token + i) % self.engine.vocab_size, -0.5 - i) for i in range(sampling.logprobs))
            logprobs = [TokenLogprob(token, -0.5, top)]
        output = Output(self.request.id, [token], text, logprobs, finish, reason, prompt_logprobs=prompt_logprobs)
        output.progress = progress
        self.engine.metrics.generated_tokens += 1
        self.put(output)

    def _prompt_logprobs(self) -> PromptLogprobs | None:
        """Token t has the logit -t, so that the log probabilities of prompts decrease with their token ids."""
        top = self.request.prompt_logprobs
        if top is None:
            return None
        logprobs = PromptLogprobs(self.request.prompt, top)
        for _ in range(len(logprobs)):
            assert logprobs.add(-np.arange(self.engine.vocab_size, dtype=np.float32))
        return logprobs

    def _choose(self) -> int:
        """The script's token if the grammar allows it, otherwise the first allowed token."""
        token = self.script[self.at] if self.at < len(self.script) else self.script[0]
        if self.grammar is None or self.grammar.finished:
            return token if self.grammar is None else self.engine.tokenizer.eos_token_id
        if self.grammar.mask(self.bits):
            allowed = [t for t in range(self.engine.vocab_size) if self.bits[t // 32] >> (t % 32) & 1]
            if token not in allowed:
                token = allowed[0]
        self.grammar.accept(token)
        return token
