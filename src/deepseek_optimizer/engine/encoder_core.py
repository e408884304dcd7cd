"""The core of an engine for encoders: a step encodes the texts of several requests, clients taking turns. Single-threaded.

It has the interface of `EngineCore` that `AsyncEngine` uses. There is no cache and no text to generate: a request ends with the
step that encodes it. Does not import torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointChangedError, ContextLengthError, RequestError, shown
from .adapters import Adapter, Adapters
from .ending import ended_early
from .metrics import EndedRequest, EngineMetrics
from .model_facts import ModelFacts
from .options import EngineOptions
from .pooling import pooled
from .request import Finish, Output, Request, check_quality, check_reading, check_tokens
from .scheduling.turns import Turns, alternating

_log = logging.getLogger(__name__)
_MAX_TEXTS = 256  # of a step, so that a client's many short texts delay others by little


@dataclass(frozen=True)
class Classifier:
    """A classification head.

    Attributes:
        labels: names of the classes.
        activation: function from logits to the class probabilities.
        score_activation: the same for a head with one class that scores pairs of texts.
    """

    labels: tuple[str, ...]
    activation: Literal["identity", "sigmoid", "softmax"]
    score_activation: Literal["identity", "sigmoid"] = "sigmoid"


class Encoder(Protocol):
    """Runs an encoder on whole texts."""

    def check_weights(self) -> None:
        """Raises CheckpointChangedError if a file that weights are mapped from was modified after loading."""

    def states(self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None) -> list[npt.NDArray[np.float32]]:
        """The last hidden states of each text, float32 [n, H]; texts are token ids, types the type of each token."""

    def logits(self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None) -> npt.NDArray[np.float32]:
        """The logits of the classes for each text, float32 [texts, classes]."""


class EncoderRequest:
    """State of a request in the engine.

    Attributes:
        number: order of arrival.
        request: the request.
        arrived, started: times of arrival and of its step, by the engine's clock.
        first, generated, cached, preempted: None and 0, as no text is generated; for the metrics.
    """

    def __init__(self, number: int, request: Request, arrived: float) -> None:
        self.number, self.request, self.arrived = number, request, arrived
        self.started: float | None = None
        self.first: float | None = None
        self.generated = self.cached = self.preempted = 0
        self.cancelled = False


class EncoderCore:
    """Schedules and runs requests.

    Args:
        runner: runs the model.
        facts: properties of the model.
        options: options of the engine: `step_tokens` and `max_waiting`.
        tokenizer: of the model.
        classifier: the model's classification head; None: it has none.
        clock: returns the time in seconds.
        keep: objects to keep alive as long as the engine, such as the model.
    """

    sliding = None
    stalled = False
    adapters: Adapters | None = None

    def __init__(
        self,
        runner: Encoder,
        facts: ModelFacts,
        options: EngineOptions,
        tokenizer: Any = None,
        classifier: Classifier | None = None,
        clock: Callable[[], float] = time.monotonic,
        keep: Any = None,
    ) -> None:
        self.runner, self.facts, self.options, self.tokenizer = runner, facts, options, tokenizer
        self.classifier, self.clock, self._keep = classifier, clock, keep
        self.metrics = EngineMetrics()
        self.on_ended: Callable[[EndedRequest, Finish], None] | None = None
        self._requests: dict[str, EncoderRequest] = {}  # in order of arrival
        self._turns = Turns()
        self._count = 0

    @property
    def room(self) -> int:
        """Maximum number of tokens of a request."""
        return self.facts.context

    @property
    def idle(self) -> bool:
        return not self._requests

    @property
    def requests(self) -> int:
        """Number of requests in the engine."""
        return len(self._requests)

    @property
    def load(self) -> tuple[int, int]:
        """Number of requests in the current step, and of requests that wait."""
        requests = list(self._requests.values())
        running = sum(r.started is not None for r in requests)
        return running, len(requests) - running

    def release_memory(self) -> None:
        """Does nothing: an encoder has no cache."""

    def check(self, request: Request, adapter: Adapter | None = None) -> int:
        """Checks a request; returns 0, the number of tokens to generate. `adapter`: always None, as encoders have none.

        Raises:
            ContextLengthError: the text is too long.
            RequestError: the request can never be served for another reason.
        """
        prompt, facts = request.prompt, self.facts
        if not (request.embed or request.classify):
            raise RequestError("model", "this model is an encoder, which cannot generate text; use /v1/embeddings")
        check_tokens(request, facts.vocab_size)
        check_reading(request, classifies=self.classifier is not None)
        check_quality(request, facts.qualities)
        if len(prompt) > facts.context:
            message = f"{len(prompt)} tokens do not fit: this model's maximum context length is {facts.context} tokens"
            raise ContextLengthError("prompt", message, len(prompt), facts.context)
        return 0

    def add(self, request: Request, adapter: Adapter | None = None, arrived: float | None = None) -> None:
        """Adds a request to the waiting ones, see `EngineCore.add`. `adapter`: always None, as encoders have none.

        Raises:
            RequestError: a request with this id is in the engine already, or the request can never be served.
        """
        if request.id in self._requests:
            raise RequestError("id", f"{shown(request.id)} is running already")
        self.check(request)
        self._count += 1
        self._requests[request.id] = EncoderRequest(self._count, request, self.clock() if arrived is None else arrived)

    def cancel(self, request_id: str) -> None:
        """Cancels a request: it ends with the next step, unless it has ended already."""
        if (waiting := self._requests.get(request_id)) is not None:
            waiting.cancelled = True

    def step(self) -> list[Output]:
        """Encodes the next texts and returns their outputs.

        Raises:
            CheckpointChangedError: a file that the model's weights are mapped from was modified.
        """
        outputs = self._end_expired()
        batch = self._batch()
        if not batch:
            return outputs
        begun = self.clock()
        for r in batch:
            r.started = begun
        for group in ([r for r in batch if r.request.embed], [r for r in batch if r.request.classify]):
            if group:
                outputs += self._encode(group)
        tokens = sum(len(r.request.prompt) for r in batch)
        self.metrics.step(len(batch), 0, tokens, self.clock() - begun, 0)
        return outputs

    def _batch(self) -> list[EncoderRequest]:
        """The texts of the next step: by priority, then round-robin over clients; with at most `step_tokens` tokens."""
        chosen: list[EncoderRequest] = []
        tokens = 0
        for r in alternating(list(self._requests.values()), self._turns):
            tokens += len(r.request.prompt)
            if chosen and (tokens > self.options.step_tokens or len(chosen) == _MAX_TEXTS):
                break
            chosen.append(r)
        for r in chosen:
            self._turns.record(r.request.client, self._requests.values())
        return chosen

    def _encode(self, group: list[EncoderRequest]) -> list[Output]:
        texts = [r.request.prompt for r in group]
        types = [r.request.token_types or (0,) * len(r.request.prompt) for r in group]
        given = types if any(r.request.token_types for r in group) else None
        classify = group[0].request.classify
        try:
            if classify:
                values = list(self.runner.logits(texts, given))
            else:
                states = self.runner.states(texts, given)
                values = [pooled(rows, r.request.pooling) for r, rows in zip(group, states, strict=True)]
        except CheckpointChangedError:
            raise
        except Exception as error:  # other requests are not affected
            _log.exception("encoding %d texts failed", len(group))
            failed = [self._end(r, "error", f"{type(error).__name__}: {error}") for r in group]
            for output in failed:
                output.transient = isinstance(error, MemoryError)
            return failed
        return [self._finish(r, value, classify) for r, value in zip(group, values, strict=True)]

    def _finish(self, r: EncoderRequest, value: npt.NDArray[np.float32], classify: bool) -> Output:
        if not np.isfinite(value).all():
            return self._end(r, "error", "the model's output is not finite")
        output = self._end(r, "stop")
        if classify:
            output.scores = value
        else:
            output.embedding = value
        return output

    def _end_expired(self) -> list[Output]:
        return [self._end(r, finish) for r, finish in ended_early(self._requests.values(), self.clock())]

    def _end(self, r: EncoderRequest, finish: Finish, error: str | None = None) -> Output:
        del self._requests[r.request.id]
        self.metrics.ended(r, finish, self.clock())
        if self.on_ended is not None:
            self.on_ended(r, finish)
        return Output(r.request.id, finish=finish, error=error, prompt_tokens=len(r.request.prompt))
