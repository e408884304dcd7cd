"""Load on a running server with an OpenAI-compatible API: many requests at once, and the times at which each answer arrived.

The client often runs beside the server on one machine, so during an answer it only records bytes and times (`http_client`).
Percentiles are over requests; those of `itl_ms` are over all gaps between the pieces of answers, which have several tokens if
the server sends several at once.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..chat.remote import RemoteError, RemoteSpeaker, error_message
from ..errors import ConfigError, excerpt
from .http_client import Address, HttpReply, ask
from .metrics import METRICS
from .random_texts import TokenCount, random_text
from .statistics import summary

_PROBES = (16, 144)  # words of the two requests that count a server's tokens
_PATHS = {"chat": "/chat/completions", "completions": "/completions"}
_MOST_REQUESTS, _MOST_TOKENS = 1_000_000, 10_000_000
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoadRequest:
    """What is sent.

    Attributes:
        url: http://host:port, with the path of the API if it is not /v1.
        key: API key; None: none is sent.
        model: the model's name on the server; None: its only one.
        endpoint: "chat" or "completions".
        prompt, new: tokens of each prompt, about, and of each answer.
        concurrency: maximum number of requests at once.
        rate: requests per second, which arrive at random (a Poisson process) unless `concurrency` are running; None: the next
            request follows when one ends.
        requests: number of requests; None: four times the concurrency.
        seed: of the prompts and arrivals; None: new ones, which no cache of the server knows.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    model: str | None = None
    endpoint: str = "chat"
    prompt: int = 512
    new: int = 64
    concurrency: int = 16
    rate: float | None = None
    requests: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, most in (
            ("prompt", self.prompt, _MOST_TOKENS),
            ("new", self.new, _MOST_TOKENS),
            ("concurrency", self.concurrency, 65536),
            ("requests", self.count, _MOST_REQUESTS),
        ):
            if not 1 <= value <= most:
                raise ConfigError(f"{name} must be from 1 to {most:,}, got {value:,}")
        if self.rate is not None and not 0 < self.rate < 1e6:
            raise ConfigError(f"rate must be above 0, got {self.rate}")
        if self.endpoint not in _PATHS:
            raise ConfigError(f"endpoint must be {' or '.join(_PATHS)}, got {self.endpoint!r}")

    @property
    def count(self) -> int:
        """Number of requests."""
        return 4 * self.concurrency if self.requests is None else self.requests


def run(request: LoadRequest, progress: OnProgress = lambda done, total: None) -> dict[str, Any]:
    """Sends the requests and returns the report: figures as `metrics` defines them, counts and failures.

    Raises:
        ConfigError: a setting is invalid, or the server has several models.
        RemoteError: the server cannot be reached, or refuses the first request.
    """
    speaker = RemoteSpeaker(request.url, request.key, request.model)
    try:
        address = Address.of(speaker.base)
    except ValueError as error:
        raise ConfigError(f"--url: {error}") from error
    return asyncio.run(_Load(request, address, speaker.model).run(progress))


class _Load:
    """One run."""

    def __init__(self, request: LoadRequest, address: Address, model: str) -> None:
        self._request, self._address, self._model = request, address, model
        self._seed = random.SystemRandom().randrange(1 << 32) if request.seed is None else request.seed
        self._rng = random.Random(self._seed)
        self._extra: dict[str, Any] = {"ignore_eos": True}

    async def run(self, progress: OnProgress) -> dict[str, Any]:
        r = self._request
        words = (await self._count()).words(r.prompt)
        texts = [random_text(words, self._rng) for _ in range(r.count)]
        arrivals = random.Random(self._seed + 1)
        gaps = [0.0 if r.rate is None else arrivals.expovariate(r.rate) for _ in texts]
        free, ended = asyncio.Semaphore(r.concurrency), 0

        async def one(text: str) -> HttpReply | OSError:
            nonlocal ended
            try:
                return await ask(self._address, self._path, self._body(text, r.new), key=r.key)
            except OSError as error:
                return error
            finally:
                free.release()
                ended += 1
                progress(ended, r.count)

        began, due, tasks = time.perf_counter(), 0.0, []
        for text, gap in zip(texts, gaps, strict=True):
            due += gap
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            await free.acquire()
            tasks.append(asyncio.create_task(one(text)))
        replies = await asyncio.gather(*tasks)
        return self._report(replies, began, time.perf_counter() - began)

    @property
    def _path(self) -> str:
        return _PATHS[self._request.endpoint]

    def _body(self, text: str, new: int, stream: bool = True) -> dict[str, Any]:
        asked = {"messages": [{"role": "user", "content": text}]} if self._request.endpoint == "chat" else {"prompt": text}
        body = {"model": self._model, **asked, "max_tokens": new, **self._extra}
        return {**body, "stream": True, "stream_options": {"include_usage": True}} if stream else body

    async def _count(self) -> TokenCount:
        """How the server counts tokens, by two requests of one token. `ignore_eos` is left out from now on if it is refused."""
        counts: list[tuple[int, int]] = []
        for words in _PROBES:
            reply = await self._probe(words)
            if reply.status in (400, 422) and self._extra:
                self._extra = {}
                reply = await self._probe(words)
            if reply.status != 200:
                remedy = "; give its API key (--api-key)" if reply.status in (401, 403) else ""
                raise RemoteError(f"{self._request.url} refused a request: {_reason(reply)}{remedy}")
            usage = _usage(reply)
            counts.append((words, int(usage.get("prompt_tokens") or words)))
        return TokenCount.of(*counts)

    async def _probe(self, words: int) -> HttpReply:
        body = self._body(random_text(words, self._rng), 1, stream=False)
        try:
            return await ask(self._address, self._path, body, key=self._request.key)
        except OSError as error:
            raise RemoteError(f"cannot reach {self._request.url}: {error}") from error

    def _report(self, replies: list[HttpReply | OSError], began: float, seconds: float) -> dict[str, Any]:
        r = self._request
        answers = [_Answer.of(reply) for reply in replies if isinstance(reply, HttpReply) and _whole(reply)]
        failures = Counter(_reason(reply) for reply in replies if not (isinstance(reply, HttpReply) and _whole(reply)))
        whole = max((answer.times[-1] for answer in answers), default=began + seconds) - began
        totals = {
            "output_tok_s": sum(answer.tokens for answer in answers) / whole,
            "requests_s": len(answers) / whole,
        }
        settings = {name: value for name, value in asdict(r).items() if name not in ("key", "model", "seed", "requests")}
        return {
            "settings": {**settings, "requests": r.count, "model": self._model, "seed": self._seed, **self._extra},
            "seconds": whole,
            "completed": len(answers),
            "failed": sum(failures.values()),
            "failures": dict(failures),
            "prompt_tokens": sum(answer.prompt for answer in answers),
            "output_tokens": sum(answer.tokens for answer in answers),
            "tokens_were_counted": all(answer.counted for answer in answers),
            "totals": totals,
            "figures": _figures(answers),
        }


@dataclass(frozen=True)
class _Answer:
    """A complete answer.

    Attributes:
        sent: when the request was sent.
        times: when its pieces arrived; at least one.
        prompt, tokens: counted by the server; `counted`: whether it did, otherwise `tokens` is the number of pieces.
    """

    sent: float
    times: list[float]
    prompt: int
    tokens: int
    counted: bool

    @classmethod
    def of(cls, reply: HttpReply) -> _Answer:
        usage, times = _usage(reply), reply.pieces
        tokens = usage.get("completion_tokens")
        return cls(reply.sent, times, int(usage.get("prompt_tokens") or 0), int(tokens or len(times)), tokens is not None)


def _figures(answers: list[_Answer]) -> dict[str, dict[str, Any]]:
    """Metric -> unit, number of samples and percentiles."""
    values: dict[str, list[float]] = {
        "ttft_ms": [a.times[0] - a.sent for a in answers],
        "tpot_ms": [(a.times[-1] - a.times[0]) / (a.tokens - 1) for a in answers if a.tokens > 1],
        "itl_ms": [after - before for a in answers for before, after in zip(a.times, a.times[1:], strict=False)],
        "e2e_ms": [a.times[-1] - a.sent for a in answers],
    }
    return {
        name: {"unit": METRICS[name].unit, **summary([1e3 * value for value in seconds])}
        for name, seconds in values.items()
        if seconds
    }


def _whole(reply: HttpReply) -> bool:
    return reply.status == 200 and (reply.whole or reply.done) and bool(reply.pieces)


def _usage(reply: HttpReply) -> Mapping[str, Any]:
    try:
        usage = reply.usage
    except (ValueError, AttributeError):  # not JSON, or not an object
        usage = None
    return usage if isinstance(usage, dict) else {}


def _reason(reply: HttpReply | OSError) -> str:
    """Why a request failed, in one line."""
    if isinstance(reply, OSError):
        return excerpt(f"{type(reply).__name__}: {reply}")
    if reply.status == 200:
        return "the answer ended early" if reply.pieces else "the answer was empty"
    if reply.status == 0:
        return "the server closed the connection"
    return f"status {reply.status}: {excerpt(_message(reply.body))}"


def _message(body: bytes) -> str:
    try:
        message = error_message(json.loads(body))
    except ValueError:
        message = ""
    return message or " ".join(body.decode("utf-8", "replace").split())
