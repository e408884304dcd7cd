"""Clients of a server on this machine, each with a connection of its own, in a process beside it on the same cores:

    python -m benchmarks.load throughput --port 8000 --vocabulary 49152 --seed 1
    python -m benchmarks.load first | stall --port 8000 ...

Prints figures as one JSON object, its last line. Prompts are those of `benchmarks.offline` for the same seed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from deepseek_optimizer.bench.http_client import Exchange, HttpReply, ask, send
from deepseek_optimizer.bench.statistics import percentile

from .prompts import PAUSE, chats, random_prompts

Figures = dict[str, float]
TEXTS, CHATS = "/v1/completions", "/v1/chat/completions"
LONGEST = 8_000  # tokens of a stream that must not end before it is left


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--port", type=int, required=True)
    for name, default in (("vocabulary", 49152), ("seed", 0), ("prompt", 256), ("new", 128), ("batch", 16), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=4.0, help="that streams are watched while nothing else happens")
    a = parser.parse_args()
    print(json.dumps(asyncio.run(MEASURES[a.what](a))))


def _body(prompt: list[int], new: int) -> dict[str, Any]:
    usage = {"include_usage": True}
    return {
        "prompt": prompt,
        "max_tokens": new,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": usage,
    }


async def throughput(a: argparse.Namespace) -> Figures:
    """Tokens a second of a batch of streams, from before they connect to their last token; its first run is not counted.

    Raises: SystemExit, a stream is not whole.
    """
    speeds = []
    for run in range(1 + a.repeats):
        speeds.append(await batch(a.port, random_prompts(a.seed + run, a.batch, a.prompt, a.vocabulary), a.new))
    return {"output_tok_s": statistics.median(speeds[1:])}


async def batch(port: int, prompts: list[list[int]], new: int) -> float:
    """Tokens a second of streams of `new` tokens that start together.

    Raises: SystemExit, a stream is not whole.
    """
    began = time.perf_counter()
    replies = await asyncio.gather(*(ask(port, TEXTS, _body(prompt, new)) for prompt in prompts))
    tokens = sum(_generated(reply, new) for reply in replies)
    return tokens / (max(reply.events[-1][0] for reply in replies) - began)


def _generated(reply: HttpReply, expected: int) -> int:
    """Tokens that it brought."""
    tokens = (reply.usage or {}).get("completion_tokens") if reply.done else None
    if tokens != expected:
        raise SystemExit(f"a stream of {expected} tokens ended with {tokens}, status {reply.status}: {reply.body[-300:]!r}")
    return expected


async def first(a: argparse.Namespace) -> Figures:
    """From before a client connects until it has the first word of a short chat, with nobody else there; the first two are not
    counted."""
    times = []
    for messages in chats(a.seed, 2 + a.repeats):
        await asyncio.sleep(PAUSE)
        began = time.perf_counter()
        reply = await ask(a.port, CHATS, {"messages": messages, "max_tokens": 4, "temperature": 0, "stream": True})
        if not reply.done or not reply.chunks:
            raise SystemExit(f"a chat got no answer, status {reply.status}: {reply.body[-300:]!r}")
        times.append(1e3 * (reply.chunks[0][0] - began))
    return {"ttft_ms": statistics.median(times[2:]), "ttft_p90_ms": percentile(times[2:], 90)}


async def stall(a: argparse.Namespace) -> Figures:
    """Times between the pieces of `batch` streams, while nothing else happens and while a long prompt is read.

    A piece is what a step brought a stream; with drafts that can be several tokens. A prompt is read from when it was sent
    until its first token came, `repeats` times.
    """
    streams = [await send(a.port, TEXTS, _body(p, LONGEST)) for p in random_prompts(a.seed, a.batch, 64, a.vocabulary)]
    await asyncio.gather(*(stream.begun() for stream in streams))
    await asyncio.sleep(a.seconds / 4)
    idle, busy, waited = [await _watched(asyncio.sleep(a.seconds))], [], []
    for (prompt,) in (random_prompts(a.seed + 1 + n, 1, a.prompt, a.vocabulary) for n in range(a.repeats)):
        began = time.perf_counter()
        reply = await ask(a.port, TEXTS, _body(prompt, 1))
        _generated(reply, 1)
        busy.append((began, reply.events[0][0]))
        waited.append(reply.events[0][0] - began)
        idle.append(await _watched(asyncio.sleep(a.seconds / 4)))
    pieces = [await _left(stream) for stream in streams]
    quiet, stalled = (_gaps(pieces, spans) for spans in (idle, busy))
    figures = {"long_prompt_ms": 1e3 * statistics.median(waited)}
    for name, gaps in (("idle", quiet), ("busy", stalled)):
        figures |= {f"{name}_p{p}_ms": percentile(gaps, p) for p in (50, 99)} | {f"{name}_gaps": len(gaps)}
    return figures


async def _watched(rest: Awaitable[None]) -> tuple[float, float]:
    began = time.perf_counter()
    await rest
    return began, time.perf_counter()


async def _left(stream: Exchange) -> list[float]:
    """When its pieces came.

    Raises: SystemExit, it had ended, so that it was not watched to the end.
    """
    if stream.over:
        raise SystemExit(f"a stream of {LONGEST} tokens ended while it was watched")
    stream.leave()
    return [when for when, _ in (await stream.reply()).chunks]


def _gaps(streams: list[list[float]], spans: list[tuple[float, float]]) -> list[float]:
    """ms between neighboring pieces of a stream, of those that ended within a span."""
    return [
        1e3 * (then - before)
        for times in streams
        for before, then in zip(times, times[1:], strict=False)
        if any(begin < then <= end for begin, end in spans)
    ]


MEASURES: dict[str, Callable[[argparse.Namespace], Coroutine[Any, Any, Figures]]] = {
    "throughput": throughput, "first": first, "stall": stall,
}  # fmt: skip

if __name__ == "__main__":
    main()
