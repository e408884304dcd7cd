"""Honest clients beside a hostile one, and workers that are killed: `make soak`.

    python -m benchmarks.soak [--seconds 1800] [--clients 16] [--model DIRECTORY]

What the honest clients ask is asked once before, alone, with the likeliest tokens. Then each of them asks one after the other
of these again and again, while a client of another key sends large prompts, schemas and documents and cuts connections
(`hostile`), and one of the server's processes is killed now and then. Each honest request must be answered once, whole, and
with the text that it had alone; the hostile one's by a status that says what is wrong; the memory of the server, and of its
processes, must stay flat (within 2%, and 5%) over the last twenty minutes, or two thirds of the time; and in the end nothing
may be left. Prints a table, and ends with status 1 where anything of this is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from deepseek_optimizer.bench.http_client import HttpReply, ask, send
from deepseek_optimizer.bench.served import Served, resident

from . import hostile
from .attacks import percentile
from .command import conclude
from .edits import QUESTIONS
from .models import model

TEXTS, CHATS = "/v1/completions", "/v1/chat/completions"
CACHE = 256 << 20  # bytes
KEYS = 4  # of the honest clients, who share them
FLAT = 0.02, 0.05  # growth of the memory of the server, and of its processes
WINDOW, ENOUGH = 1200.0, 600.0  # seconds at the end that count for it; fewer say nothing
SAMPLE, KILLS = 2.0, (10.0, 30.0)  # seconds between looks at memory; between kills, at least and at most
SETTLE = 240.0  # seconds in which what those who left had asked for must be over
_SCHEMA = {
    "type": "object", "required": ["city", "people"], "additionalProperties": False,
    "properties": {"city": {"enum": ["Paris", "Rome", "Bonn"]}, "people": {"type": "integer", "minimum": 1, "maximum": 99}},
}  # fmt: skip
_FILE = "The lamp of the lighthouse was lit on Tuesday by Ada, who keeps the key under the third stone. " * 3


@dataclass(frozen=True)
class Question:
    """What an honest client asks."""

    kind: str
    path: str
    body: dict[str, Any]


def questions(tokens: int = 24) -> list[Question]:
    """Of all kinds, with the likeliest tokens.

    Args:
        tokens: of an answer.
    """

    def chat(kind: str, content: Any, **fields: Any) -> Question:
        messages = [{"role": "user", "content": content}]
        return Question(kind, CHATS, {"messages": messages, "max_tokens": tokens, "temperature": 0, **fields})

    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": _SCHEMA}}
    found = []
    for n, question in enumerate(QUESTIONS[:6]):
        text = f"{n}: {question}"
        found += [chat("chat", question), chat("stream", text, stream=True)]
        found.append(Question("text", TEXTS, {"prompt": text, "max_tokens": tokens, "temperature": 0}))
    for n in range(3):
        found.append(chat("schema", f"Name city {n}, and how many people you saw there.", response_format=form))
        data = f"data:text/plain;base64,{base64.b64encode(f'{n}. {_FILE}'.encode()).decode()}"
        file = {"type": "file", "file": {"filename": f"{n}.txt", "file_data": data}}
        found.append(chat("file", [file, {"type": "text", "text": "Who lit the lamp?"}]))
    return found


@dataclass
class Honest:
    """Honest clients.

    Attributes:
        expected: text of each question.
        sent, answered: requests by kind.
        times: seconds that answers took.
    """

    port: int
    keys: list[str]
    asked: list[Question]
    expected: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    async def alone(self) -> None:
        """Learns what the answers are, asking one after the other.

        Raises:
            RuntimeError: one is not answered, or not alike twice.
        """
        for question in self.asked:
            texts = []
            for _ in range(2):
                reply = await ask(self.port, question.path, question.body, key=self.keys[0])
                if wrong := _wrong(reply, question):
                    raise RuntimeError(f"alone, a {question.kind} {wrong}")
                texts.append(reply.text)
            if texts[0] != texts[1]:
                raise RuntimeError(f"alone, a {question.kind} was answered {texts[0]!r} and then {texts[1]!r}")
            self.expected.append(texts[0])

    async def run(self, clients: int, until: float) -> None:
        """So many clients at once; who is in the midst of a request when the time is over ends it."""
        await asyncio.gather(*(self._client(n, until) for n in range(clients)))

    async def _client(self, number: int, until: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < until:
            place = rng.randrange(len(self.asked))
            question = self.asked[place]
            self.sent[question.kind] += 1
            began = time.perf_counter()
            try:
                exchange = await send(self.port, question.path, question.body, key=self.keys[number % len(self.keys)])
                reply = await exchange.reply()
            except OSError as error:
                self.failures.append(f"{question.kind}: {type(error).__name__}: {error}")
                await asyncio.sleep(1)
                continue
            wrong = _wrong(reply, question)
            if not wrong and reply.text != self.expected[place]:
                wrong = f"was answered {reply.text!r}, and alone {self.expected[place]!r}"
            if wrong:
                self.failures.append(f"{question.kind} {wrong}")
            else:
                self.answered[question.kind] += 1
                self.times.append(time.perf_counter() - began)


def _wrong(reply: HttpReply, question: Question) -> str:
    if reply.status != 200:
        return f"got {reply.status}: {reply.body[:300]!r}"
    whole = reply.done if question.body.get("stream") else reply.whole
    return "" if whole else f"broke off: {reply.body[-300:]!r}"


@dataclass
class Memory:
    """(seconds, bytes of the server, bytes of its processes), as time goes by."""

    samples: list[tuple[float, int, int]] = field(default_factory=list)

    async def watch(self, server: Any, until: float) -> None:
        began = time.monotonic()
        while time.monotonic() < until:
            workers = sum(resident(pid) or 0 for pid in server.children)
            self.samples.append((time.monotonic() - began, server.resident_bytes, workers))
            await asyncio.sleep(SAMPLE)

    def growth(self, window: float) -> tuple[float, float] | None:
        """How much more the server, and its processes, had at the end of the last seconds than at their beginning; None: too
        few looks. Of the server by medians of the first and the last fifth; its processes grow with each document and are
        killed, so that of them the most that they come to is compared (95 of 100 looks), in the first and the second half.
        """
        end = self.samples[-1][0] if self.samples else 0.0
        seen = [sample for sample in self.samples if sample[0] >= end - window]
        fifth, half = len(seen) // 5, len(seen) // 2
        if fifth < 3:
            return None
        server = [own for _, own, _ in seen]
        others = [percentile(sorted(more for _, _, more in part)) for part in (seen[:half], seen[half:])]
        return median(server[-fifth:]) / max(1.0, median(server[:fifth])) - 1, others[1] / max(1.0, others[0]) - 1


async def kill_workers(server: Any, rng: random.Random, until: float, kills: tuple[float, float] = KILLS) -> int:
    """Ends one of the server's processes now and then; how many."""
    count = 0
    while (wait := rng.uniform(*kills)) < until - time.monotonic():
        await asyncio.sleep(wait)
        if children := server.children:
            try:
                os.kill(rng.choice(children), signal.SIGKILL)
                count += 1
            except ProcessLookupError:  # it has ended by itself
                pass
    return count


async def left_behind(server: Any) -> list[str]:
    """What the server still holds when all are gone."""
    names = ("dso:requests_admitted", "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
             "dso:queue_waiting", "dso:queue_running")  # fmt: skip
    until = time.monotonic() + SETTLE
    while True:
        found = await asyncio.to_thread(server.metrics)
        left = [f"{name} {found[name]:g}" for name in names if found[name]]
        if not left or time.monotonic() > until:
            return left
        await asyncio.sleep(0.2)


async def soak(server: Any, honest: Honest, hostile_key: str, clients: int, seconds: float, kind: str = "all") -> list[str]:
    """Prints the table; what failed.

    Args:
        server: as `Served`.
        kind: of what the hostile client sends.
    """
    await honest.alone()
    print(f"{len(honest.asked)} questions are known; {seconds:g} s begin", file=sys.stderr, flush=True)
    memory = Memory()
    with hostile.leaning(server.port, hostile_key, kind, seconds + SETTLE) as statuses:
        until = time.monotonic() + seconds
        _, _, kills, _ = await asyncio.gather(
            honest.run(clients, until), memory.watch(server, until), kill_workers(server, random.Random(0), until),
            _tell(honest, until),
        )  # fmt: skip
    left = await left_behind(server)
    window = min(WINDOW, seconds * 2 / 3)
    return report(honest, statuses, memory, kills, left, window, server.log)


async def _tell(honest: Honest, until: float) -> None:
    while (left := until - time.monotonic()) > 0:
        await asyncio.sleep(min(30.0, left))
        print(f"{honest.answered.total():,} answered, {len(honest.failures)} failures", file=sys.stderr, flush=True)


def report(
    honest: Honest, statuses: Mapping[str, int], memory: Memory, kills: int, left: list[str], window: float, log: str
) -> list[str]:
    """Prints the table; what failed.

    Args:
        statuses: how often the hostile client got each.
        left: what the server still held in the end.
        window: seconds at the end in which memory must be flat.
    """
    failures = list(honest.failures)
    if honest.answered != honest.sent and not failures:
        failures.append(f"{honest.sent.total()} requests were sent, and {honest.answered.total()} answered")
    if not honest.answered:
        failures.append("no honest request was answered")
    odd = {status: n for status, n in statuses.items() if status != "left" and status not in map(str, hostile.HARMLESS)}
    if odd:
        failures.append(f"the hostile client got {odd}")
    if not statuses:
        failures.append("the hostile client got no answer")
    growths = memory.growth(window)
    for name, growth, most in zip(("the server", "its processes"), growths or (), FLAT, strict=False):
        if growth > most and window >= ENOUGH:
            failures.append(f"the memory of {name} grew by {growth:.1%} in the last {window:.0f} s")
    failures += [f"left behind: {what}" for what in left]
    if "Traceback" in log:
        failures.append(f"the server's log has a traceback: {log[log.index('Traceback') :][:2000]}")
    times = sorted(honest.times) or [0.0]
    kinds = ", ".join(f"{kind} {n:,}" for kind, n in sorted(honest.answered.items()))
    shown = [f"{growth:+.2%}" for growth in growths] if growths else ["not known"] * 2
    sizes = [f"{sample / 1e6:,.0f} MB" for sample in (memory.samples[-1][1:] if memory.samples else (0, 0))]
    print(f"honest     {honest.sent.total():,} sent, {honest.answered.total():,} answered rightly: {kinds}")
    print(f"times      median {median(times):.2f} s, p95 {percentile(times):.2f} s, slowest {times[-1]:.2f} s")
    print(f"hostile    {', '.join(f'{status} {n:,}' for status, n in sorted(statuses.items()))}")
    print(f"killed     {kills} processes")
    print(f"memory     server {sizes[0]}, {shown[0]}; its processes {sizes[1]}, {shown[1]}; over the last {window:.0f} s")
    print(f"left       {', '.join(left) or 'nothing'}", flush=True)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--model", type=Path, help="a directory; default: SmolLM2-135M in int4")
    a = parser.parse_args()
    keys = [f"honest-key-{n}" for n in range(KEYS)]
    environment = {"DSO_API_KEYS": ",".join([*keys, "hostile-key"])}
    served = Served(
        a.model or model("smol", "int4"), "--kv-cache-memory", str(CACHE), environment=environment, key=keys[0]
    )  # fmt: skip
    with served as server:
        honest = Honest(server.port, keys, questions())
        failures = asyncio.run(soak(server, honest, "hostile-key", a.clients, a.seconds))
    conclude(failures, server)


if __name__ == "__main__":
    main()
