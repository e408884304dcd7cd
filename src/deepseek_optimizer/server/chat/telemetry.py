"""llama-server's `timings`, `prompt_progress` and `__verbose`, added to answers of OpenAI's protocols that ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from ...engine.request import Output
from ..http.problems import ApiError
from ..protocol.telemetry import Telemetry
from .replies import Encoder
from .timings import Timings, native_timings, prompt_progress

_END, _DONE = b"}\n\n", b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Wanted:
    """What a request asks for.

    Attributes:
        timings: `timings` in the answer, and in a stream with each token.
        progress: `prompt_progress` in a stream.
        prompt: text of the prompt, for `__verbose`; None: it is not returned.
    """

    timings: bool = False
    progress: bool = False
    prompt: str | None = None


def wanted_telemetry(body: Telemetry, stream: bool, prompt: str | None = None) -> Wanted:
    """What a request asks for; arguments as in `Wanted`."""
    return Wanted(bool(body.timings_per_token), bool(body.return_progress) and stream, prompt)


class ProgressEncoder(Encoder, Protocol):
    """An encoder whose streams may report progress."""

    def progressed(self, index: int) -> bytes:
        """An event without text, to which the progress of the prompt is added."""


class Collector(Protocol):
    """Collects a whole answer."""

    def feed(self, index: int, output: Output) -> object:
        """Adds an output of the answer `index`."""

    def body(self) -> dict[str, Any]:
        """The answer, after the last output."""


def with_telemetry(collector: Collector, wanted: Wanted) -> Collector:
    """A collector of whole answers with what the request asks for."""
    return collector if wanted == Wanted() else _TimedCollector(collector, wanted)


def streamed_with_telemetry(encoder: ProgressEncoder, wanted: Wanted, answers: int) -> Encoder:
    """An encoder of streams with what the request asks for.

    Args:
        encoder: of the protocol.
        wanted: see `Wanted`.
        answers: number of answers.
    """
    return encoder if wanted == Wanted() else _TimedEncoder(encoder, wanted, answers)


class _TimedCollector:
    def __init__(self, collector: Collector, wanted: Wanted) -> None:
        self._collector, self._wanted, self._times = collector, wanted, Timings()

    def feed(self, index: int, output: Output) -> None:
        if index == 0:
            self._times.add(output)
        self._collector.feed(index, output)

    def body(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self._wanted.timings and self._times.last is not None:
            fields["timings"] = native_timings(self._times.last, self._times.prompt, self._times.answer)
        return {**self._collector.body(), **fields, **_verbose(self._wanted)}


class _TimedEncoder:
    def __init__(self, encoder: ProgressEncoder, wanted: Wanted, answers: int) -> None:
        self._encoder, self._wanted = encoder, wanted
        self._times = [Timings() for _ in range(answers)]

    def feed(self, index: int, output: Output) -> bytes:
        times, events = self._times[index], b""
        for processed in output.progress:
            seconds = times.elapsed if processed > output.cached_tokens else 0.0
            fields: dict[str, Any] = {"prompt_progress": prompt_progress(output, processed, seconds)}
            if self._wanted.timings:
                fields["timings"] = native_timings(output, seconds, 0.0, processed)
            events += _with_fields(self._encoder.progressed(index), fields)
        if not output.token_ids and output.finish is None:  # there is only progress
            return events
        times.add(output)
        fields = self._timings(index) if output.finish is None else self._timings(index) | _verbose(self._wanted)
        return events + _with_fields(self._encoder.feed(index, output), fields)

    def last(self) -> bytes:
        data = self._encoder.last()
        done = _DONE if data.endswith(_DONE) else b""
        return _with_fields(data.removesuffix(done), self._timings(0)) + done

    def broken(self, error: ApiError) -> bytes:
        return self._encoder.broken(error)

    def _timings(self, index: int) -> dict[str, Any]:
        times = self._times[index]
        if not self._wanted.timings or times.last is None:
            return {}
        return {"timings": native_timings(times.last, times.prompt, times.answer)}


def _verbose(wanted: Wanted) -> dict[str, Any]:
    return {} if wanted.prompt is None else {"__verbose": {"prompt": wanted.prompt}}


def _with_fields(events: bytes, fields: Mapping[str, Any]) -> bytes:
    """Adds fields to the last of some events, each of which ends with a JSON object that is not empty."""
    if not fields or not events.endswith(_END):
        return events
    return events.removesuffix(_END) + b"," + orjson.dumps(fields)[1:-1] + _END
