"""Many clients lean on `dso serve` for minutes: `make soak`.

    python -m benchmarks.mixed_soak [--seconds 600] [--clients 64] [--quick]

Prompts of all lengths, some of which begin alike, texts and chats, streamed or whole, greedy and sampled, JSON schemas and
regular expressions, and clients that leave in the midst of it. Every answer is checked for what can be known of it; some greedy
requests come again and again, and must be answered alike each time. At the end nothing may be left: no request, no block, no
memory beyond what was there when the cache had filled up. Prints what was done, and ends with status 1 on any failure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deepseek_optimizer.bench.http_client import HttpReply, ask, send
from deepseek_optimizer.bench.served import Served

from .command import conclude
from .edits import EDITS, QUESTIONS
from .models import model

TEXTS, CHATS = "/v1/completions", "/v1/chat/completions"
CACHE = 256 << 20  # bytes: fewer blocks than all running requests can use
GROWTH = 48 << 20  # bytes of resident memory that may come after the first third of the time
FULL = 60.0  # seconds until that third has filled the cache
SETTLE = 5.0  # seconds that those who left at the very end have: their requests end with the next step
LEAVING, AGAIN, FORMS = 0.1, 0.05, 0.1  # shares of requests
PATTERN = r"[0-9]{3}-[a-f]{2,5}"
SCHEMA = {
    "type": "object", "required": ["city", "people"], "additionalProperties": False,
    "properties": {"city": {"enum": ["Paris", "Rome", "Bonn"]}, "people": {"type": "integer", "minimum": 1, "maximum": 99}},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="ten seconds: whether it works; memory is shown alone")
    a = parser.parse_args()
    seconds = min(a.seconds, 10.0) if a.quick else a.seconds
    with Served(model("smol", "int4"), "--kv-cache-memory", str(CACHE)) as server:
        soak = Soak(server.port, a.seed)
        failures = run(soak, server, a.clients, seconds)
    conclude(failures, server)


@dataclass(frozen=True)
class Asked:
    """A request, and what is wrong with its answer: a word, or nothing."""

    kind: str
    path: str
    body: dict[str, Any]
    check: Callable[[HttpReply], str]


@dataclass
class Soak:
    """
    Args:
        port: of the server.
        longest: tokens of a prompt, and of a text, at most.
        vocabulary: of token ids that prompts are made of.
    """

    port: int
    seed: int
    longest: tuple[int, int] = (1500, 200)
    vocabulary: int = 49152
    done: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    failures: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)  # greedy requests that come again, and their text

    async def clients(self, count: int, seconds: float) -> None:
        """So many, each with one request after the other; who is in the midst of one when the time is over ends it."""
        until = time.monotonic() + seconds
        await asyncio.gather(*(self._client(random.Random(f"{self.seed} {n}"), until) for n in range(count)))

    async def _client(self, rng: random.Random, until: float) -> None:
        while time.monotonic() < until:
            asked = self.request(rng)
            try:
                await self._ask(asked, rng)
            except Exception as error:  # a connection that breaks, an answer that cannot be read: a failure, and not the end
                self.failures.append(f"{asked.kind}: {type(error).__name__}: {error}")
                await asyncio.sleep(1)

    async def _ask(self, asked: Asked, rng: random.Random) -> None:
        exchange = await send(self.port, asked.path, asked.body)
        if rng.random() < LEAVING:
            await asyncio.sleep(rng.random() ** 3 * 5)
            exchange.leave()
            await exchange.reply()
            self.done["left"] += 1
            return
        reply = await exchange.reply()
        if reply.status == 429:
            self.done["refused"] += 1
            await asyncio.sleep(reply.retry_after)
            return
        if wrong := self._wrong(asked, reply):
            self.failures.append(f"{asked.kind}: {wrong}; status {reply.status}, {json.dumps(asked.body)[:300]}")
            return
        self.done[asked.kind] += 1
        self.tokens += (reply.usage or {}).get("completion_tokens", 0)

    def _wrong(self, asked: Asked, reply: HttpReply) -> str:
        if reply.status != 200:
            return f"refused: {reply.body[:300]!r}"
        if not (reply.done if asked.body.get("stream") else reply.whole):
            return f"broke off: {reply.body[-300:]!r}"
        return asked.check(reply)

    def request(self, rng: random.Random) -> Asked:
        """One at random."""
        chance = rng.random()
        if chance < AGAIN:
            return self._again(rng)
        if chance < AGAIN + FORMS:
            return self._form(rng)
        return rng.choice((self._text, self._text, self._chat))(rng)

    def _text(self, rng: random.Random) -> Asked:
        prompt, text = self.longest
        ids = [rng.randrange(10, self.vocabulary) for _ in range(1 + int(rng.random() ** 3 * (prompt - 1)))]
        body = {"prompt": ids, "max_tokens": rng.randrange(1, text), "ignore_eos": True, **_options(rng)}
        return Asked("text", TEXTS, body, _count(body["max_tokens"]))

    def _chat(self, rng: random.Random) -> Asked:
        """Most begin with one of a few long system prompts."""
        system, question = f"You know this text:\n\n{rng.choice(EDITS)[0]}", rng.choice(QUESTIONS)
        messages = [{"role": "system", "content": system}] if rng.random() < 0.8 else []
        messages = [*messages, {"role": "user", "content": question}]
        body = {"messages": messages, "max_tokens": rng.randrange(1, self.longest[1]), **_options(rng)}
        return Asked("chat", CHATS, body, lambda reply: "")

    def _form(self, rng: random.Random) -> Asked:
        options = {**_options(rng), "max_tokens": min(60, self.longest[1])}
        if rng.random() < 0.5:
            return Asked("pattern", TEXTS, {"prompt": "A code:", "guided_regex": PATTERN, **options}, _matches)
        form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
        messages = [{"role": "user", "content": "Name a city, and how many people you saw there."}]
        return Asked("schema", CHATS, {"messages": messages, "response_format": form, **options}, _fits)

    def _again(self, rng: random.Random) -> Asked:
        number = rng.randrange(8)
        prompt = random.Random(number).choices(range(10, self.vocabulary), k=10 + self.longest[0] // 20 * number)
        body = {"prompt": prompt, "max_tokens": min(64, self.longest[1]), "temperature": 0, "stream": rng.random() < 0.5}

        def same(reply: HttpReply) -> str:
            text = self.known.setdefault(str(number), reply.text)
            return "" if reply.text == text else f"answered {reply.text!r} and before {text!r}"

        return Asked("again", TEXTS, body, same)


def _options(rng: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {"temperature": rng.choice((0, 0.7, 1.0))}
    if rng.random() < 0.5:
        found |= {"stream": True, "stream_options": {"include_usage": True}}
    if rng.random() < 0.2:
        found |= {"seed": rng.randrange(100), "top_p": 0.9, "repetition_penalty": 1.1}
    return found


def _count(tokens: int) -> Callable[[HttpReply], str]:
    def check(reply: HttpReply) -> str:
        found = (reply.usage or {}).get("completion_tokens")
        return "" if found == tokens else f"{tokens} tokens were asked for, and {found} came"

    return check


def _ended(reply: HttpReply) -> bool:
    """Whether the text came to its own end, and not to that of its tokens."""
    events = [event for _, event in reply.events] or [reply.json()]
    return any(choice.get("finish_reason") == "stop" for event in events for choice in event["choices"])


def _matches(reply: HttpReply) -> str:
    return "" if not _ended(reply) or re.fullmatch(PATTERN, reply.text) else f"{reply.text!r} is not of the pattern"


def _fits(reply: HttpReply) -> str:
    if not _ended(reply):
        return ""
    try:
        found = json.loads(reply.text)
    except ValueError:
        return f"{reply.text!r} is no JSON"
    fits = set(found) == {"city", "people"} and found["city"] in ("Paris", "Rome", "Bonn") and 1 <= found["people"] <= 99
    return "" if fits else f"{reply.text!r} is not of the schema"


def run(soak: Soak, server: Any, clients: int, seconds: float) -> list[str]:
    """What failed.

    Args:
        server: with `metrics()`, `resident_bytes` and `log`.
    """
    resident, blocks = asyncio.run(_watched(soak, server, clients, seconds))
    failures = [*soak.failures]
    begin, end = resident
    if end - begin > GROWTH and seconds / 3 >= FULL:
        failures.append(f"memory grew from {begin / 1e6:.0f} to {end / 1e6:.0f} MB")
    failures += [f"left behind: {name} {value:g}" for name, value in blocks.items() if value]
    if "Traceback" in server.log:
        failures.append(f"the server's log has a traceback: {server.log[-2000:]}")
    print(f"requests   {sum(soak.done.values()):,}: {', '.join(f'{kind} {n:,}' for kind, n in sorted(soak.done.items()))}")
    print(f"tokens     {soak.tokens:,}")
    print(f"errors     {len(soak.failures)}")
    print(f"memory     {begin / 1e6:.0f} MB after a third of the time, {end / 1e6:.0f} MB at the end")
    print(f"left       {', '.join(f'{name} {value:g}' for name, value in blocks.items())}", flush=True)
    return failures


async def _watched(soak: Soak, server: Any, clients: int, seconds: float) -> tuple[tuple[int, int], dict[str, float]]:
    """((resident bytes after a third of the time, and at the end), what is left in the server)."""
    working = asyncio.ensure_future(soak.clients(clients, seconds))
    await asyncio.wait([working], timeout=seconds / 3)
    begin = server.resident_bytes
    while not working.done():
        await asyncio.wait([working], timeout=30)
        print(f"{sum(soak.done.values()):,} requests, {len(soak.failures)} errors", file=sys.stderr)
    await working
    health = await ask(soak.port, "/health")
    if health.status != 200:
        soak.failures.append(f"the server is not well: {health.body!r}")
    names = ("dso:requests_admitted", "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    left: dict[str, float] = {}
    until = time.monotonic() + SETTLE
    while True:
        found = await asyncio.to_thread(server.metrics)
        left = {name: found[name] for name in names}
        if not any(left.values()) or time.monotonic() > until:
            break
        await asyncio.sleep(0.1)
    return (begin, server.resident_bytes), left


if __name__ == "__main__":
    main()
