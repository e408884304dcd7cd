"""Clients with conversations, which go on while something happens to the server, and count how each request ended."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count

import httpx

ANSWERED, CUT = "answered", "cut off after its first token, and repeated"
_WORDS = "time person year way day thing man world life hand part child eye woman place work week case point company".split()


@dataclass
class Load:
    """What clients do.

    Attributes:
        clients: their number; those with a higher one stop, so that it may fall meanwhile.
        turns: of a conversation.
        tokens: of an answer.
        go_on: start another conversation after the last turn; while it is false, clients stop there.
    """

    clients: int
    turns: int
    tokens: int
    go_on: bool = False


@dataclass
class Outcome:
    """What the clients saw.

    Attributes:
        tokens, prompt, cached: of answers, prompts, and prompts from the prefix cache.
        seconds: from the first request to the last answer.
        first: seconds to the first token of each answer.
        ended: number of requests by how they ended: `ANSWERED`, with all of its tokens, `CUT`, a status, or what else.
        replicas: number of answers by the replica that they came from.
    """

    tokens: int = 0
    prompt: int = 0
    cached: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)
    replicas: Counter[str] = field(default_factory=Counter)

    @property
    def unanswered(self) -> int:
        """Requests that ended in another way than those that may be: see `CUT`."""
        return self.ended.total() - self.ended[ANSWERED] - self.ended[CUT]

    def row(self) -> dict[str, object]:
        return {
            "tokens_per_s": round(self.tokens / self.seconds, 1),
            "first_token_ms": round(self.first_ms, 1),
            "cached_share": round(self.cached / max(1, self.prompt), 4),
            "ended": dict(self.ended),
            "unanswered": self.unanswered,
            "replicas": sorted(self.replicas.values()),
        }

    @property
    def first_ms(self) -> float:
        """The median time to the first token; 0: there was none."""
        return 1000 * statistics.median(self.first or [0.0])


async def drive(
    url: str, load: Load, event: Callable[[Load, Outcome], Awaitable[None]] | None = None, seed: int = 0
) -> Outcome:
    """Runs the clients.

    Args:
        url: of the server.
        load: what they do.
        event: what happens meanwhile; clients go on until it has ended, and to the end of their conversations.
        seed: of the texts.
    """
    outcome, load.go_on = Outcome(), event is not None
    limits = httpx.Limits(max_connections=load.clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        begin = time.perf_counter()
        running = asyncio.gather(*(_converse(client, n, load, outcome, seed) for n in range(load.clients)))
        try:
            if event is not None:
                await event(load, outcome)
        finally:
            load.go_on = False
        await running
        outcome.seconds = time.perf_counter() - begin
    return outcome


async def _converse(client: httpx.AsyncClient, number: int, load: Load, outcome: Outcome, seed: int) -> None:
    """One client: each turn continues the conversation. Groups of clients have the same first message."""
    rng = random.Random(f"{seed} {number}")
    text = lambda length: " ".join(rng.choices(_WORDS, k=length))  # noqa: E731
    shared = " ".join(random.Random(f"{seed} group {number % 4}").choices(_WORDS, k=200))
    for conversation in count():
        messages = [{"role": "system", "content": shared}, {"role": "user", "content": text(40)}]
        for _ in range(load.turns):
            if number >= load.clients or (conversation and not load.go_on):
                return
            answer, ended = await _ask(client, messages, load.tokens, outcome)
            if ended == CUT:
                answer, ended = await _ask(client, messages, load.tokens, outcome)
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": text(20)}]
        if not load.go_on:
            return


async def _ask(client: httpx.AsyncClient, messages: list[dict[str, str]], tokens: int, outcome: Outcome) -> tuple[str, str]:
    """One request: its answer, and how it ended."""
    body = {
        "messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    begin, first, answer, ended, new = time.perf_counter(), None, "", "not ended", 0
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                ended = str(response.status_code)
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    ended = ANSWERED if new == tokens else f"{new} tokens instead of {tokens}"
                    outcome.replicas[response.headers.get("x-replica-id", "")] += 1
                    break
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    ended = "an error before its first token" if first is None else CUT
                    break
                if event["choices"] and (piece := event["choices"][0]["delta"].get("content")):
                    first = first or time.perf_counter() - begin
                    answer += piece
                if usage := event.get("usage"):
                    new = usage["completion_tokens"]
                    outcome.tokens += new
                    outcome.prompt += usage["prompt_tokens"]
                    outcome.cached += usage["prompt_tokens_details"]["cached_tokens"]
    except httpx.HTTPError as error:
        ended = type(error).__name__
    outcome.ended[ended] += 1
    if first is not None:
        outcome.first.append(first)
    return answer, ended
