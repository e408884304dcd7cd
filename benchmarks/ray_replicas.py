"""Replicas on Ray beside one server: conversations of many clients, while replicas are killed.

    python -m benchmarks.ray_replicas MODEL --sides server ray1 ray2 ray2-killed

Each client has one conversation of several turns, whose first message is shared by groups of clients. Every side is a fresh
process; the clients run on the same cores. Of each side: tokens per second, the median time to the first token, the share
of prompt tokens that came from a prefix cache, and how every request ended. One table on stdout, as JSON with --json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

SIDES = {"server": 0, "ray1": 1, "ray2": 2, "ray2-killed": 2}  # name -> replicas; 0: `dso serve` without Ray
_START = 300.0  # seconds
_REPLICA = "ray::ServeReplica"  # the beginning of a replica's process name
_WORDS = "time person year way day thing man world life hand part child eye woman place work week case point company".split()


@dataclass
class Outcome:
    """What the clients of a side saw.

    Attributes:
        ended: number of requests by how they ended: "answered", "error event", "broken", or a status.
    """

    tokens: int = 0
    prompt: int = 0
    cached: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)
    replicas: Counter[str] = field(default_factory=Counter)

    def row(self) -> dict[str, object]:
        return {
            "tokens_per_s": round(self.tokens / self.seconds, 1),
            "first_token_ms": round(1000 * statistics.median(self.first), 1),
            "cached_share": round(self.cached / max(1, self.prompt), 4),
            "ended": dict(self.ended),
            "replicas": sorted(self.replicas.values()),
        }


async def converse(client: httpx.AsyncClient, number: int, turns: int, tokens: int, outcome: Outcome) -> None:
    """One client: each turn continues the conversation."""
    rng = random.Random(number)
    text = lambda count: " ".join(rng.choices(_WORDS, k=count))  # noqa: E731
    shared = " ".join(random.Random(number % 4).choices(_WORDS, k=200))
    messages = [{"role": "system", "content": shared}, {"role": "user", "content": text(40)}]
    for _ in range(turns):
        body = {
            "messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        begin, first, answer, ended = time.perf_counter(), None, "", "broken"
        try:
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    ended = str(response.status_code)
                outcome.replicas[response.headers.get("x-replica-id", "")] += 1
                async for line in response.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        ended = "answered"
                        break
                    event = json.loads(line[6:])
                    if "error" in event:
                        ended = "error event"
                        break
                    if event["choices"]:
                        piece = event["choices"][0]["delta"].get("content") or ""
                        if piece and first is None:
                            first = time.perf_counter() - begin
                        answer += piece
                    if usage := event.get("usage"):
                        outcome.tokens += usage["completion_tokens"]
                        outcome.prompt += usage["prompt_tokens"]
                        outcome.cached += usage["prompt_tokens_details"]["cached_tokens"]
        except httpx.HTTPError as error:
            ended = type(error).__name__
        outcome.ended[ended] += 1
        if first is not None:
            outcome.first.append(first)
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": text(20)}]


async def drive(url: str, clients: int, turns: int, tokens: int, kill: float | None, server: psutil.Process) -> Outcome:
    outcome = Outcome()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        begin = time.perf_counter()
        running = asyncio.gather(*(converse(client, n, turns, tokens, outcome) for n in range(clients)))
        if kill is not None:
            await asyncio.sleep(kill)
            replicas_of(server)[0].kill()
        await running
        outcome.seconds = time.perf_counter() - begin
    return outcome


def replicas_of(server: psutil.Process) -> list[psutil.Process]:
    return [p for p in server.children(recursive=True) if any(part.startswith(_REPLICA) for part in p.cmdline())]


def measure(model: str, side: str, options: argparse.Namespace, further: list[str]) -> dict[str, object]:
    """A fresh server, its clients, and the end of the server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("dso")), "serve", model, "--port", str(port), *further]
    if SIDES[side]:
        command += ["--ray", "--replicas", str(SIDES[side])]
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            end = time.monotonic() + _START
            while "address   " not in Path(log.name).read_text():
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{side} did not start:\n{Path(log.name).read_text()[-3000:]}")
                time.sleep(0.2)
            url = f"http://127.0.0.1:{port}"
            asyncio.run(drive(url, 4, 1, 8, None, psutil.Process(process.pid)))  # warms it up
            kill = options.kill_after if side.endswith("killed") else None
            outcome = asyncio.run(drive(url, options.clients, options.turns, options.tokens, kill, psutil.Process(process.pid)))
            process.send_signal(signal.SIGTERM)
            process.wait(120)
        finally:
            process.kill()
    return {"side": side, **outcome.row()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="path or name of a model; further options are those of `dso serve`")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=1, help="the sides in turns, this many times")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--kill-after", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument("--json", action="store_true")
    options, further = parser.parse_known_args()
    for _ in range(options.rounds):
        for side in options.sides:
            row = measure(options.model, side, options, further)
            if options.json:
                print(json.dumps(row), flush=True)
            else:
                print(
                    f"{side:12} {row['tokens_per_s']:>8} tokens/s   first token {row['first_token_ms']:>8} ms   "
                    f"cached {row['cached_share']:.1%}   {row['ended']}   per replica {row['replicas']}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
