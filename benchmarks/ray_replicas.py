"""Replicas on Ray beside one server: conversations of many clients, while replicas are killed, scaled and replaced.

    python -m benchmarks.ray_replicas MODEL [--sides server ray1 ray2 ray2-killed ray2-scaled ray2-rolled] [--rounds 3]

Every side is a fresh process, and its server or replicas have one core each; the clients run on the same machine. `server` and
`ray1` take turns for several rounds. After that, one client shows the time to the first token without load. Bars of issue 22:
every request is answered once (streams that had begun at a replica that was killed end with an error, and the client repeats
them), two replicas find at least 90% of the prefixes that one finds, and one replica costs at most 5% of the throughput of
`dso serve` and 5 ms to the first token. Nothing else may run meanwhile. It takes about 12 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from .ray_clients import Load, Outcome, drive
from .verdict import MISSED, REACHED

HITS, THROUGHPUT, FIRST_MS = 0.90, 0.95, 5.0  # the bars
_START, _HAPPENS = 300.0, 300.0  # seconds until a side must have started, and until what was asked for must have happened
_REPLICA = "ray::ServeReplica"  # the beginning of a replica's process name
_DOWN_AFTER, _FEW = 10, 16  # seconds of load by one client of so many until a replica ends
_LOOK = 0.2  # seconds between two looks at the replicas

Row = dict[str, Any]


class Server:
    """A side that runs: `dso serve`, perhaps with --ray."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process, self.url, self._log = process, url, log

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def replicas(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if any(part.startswith(_REPLICA) for part in process.cmdline()):
                    found.append(process)
            except psutil.Error:  # it has just ended
                continue
        return found

    async def until(self, what: str, happened: Callable[[], bool]) -> None:
        """Waits. Raises SystemExit if it takes too long."""
        end = time.monotonic() + _HAPPENS
        while not happened():
            if time.monotonic() > end:
                raise SystemExit(f"{what}: did not happen in {_HAPPENS:.0f} seconds\n{self.log[-3000:]}")
            await asyncio.sleep(_LOOK)


async def kill(server: Server, after: float, load: Load, outcome: Outcome) -> None:
    """A replica is killed, and Ray starts another one."""
    await asyncio.sleep(after)
    before = {process.pid for process in server.replicas()}
    server.replicas()[0].kill()
    await server.until("a replica instead of the killed one", lambda: len(_pids(server) - before) == 1)


async def scale(server: Server, after: float, load: Load, outcome: Outcome) -> None:
    """All clients make Ray add a replica; when that has answered, few are left, and it is removed again."""
    await server.until("a second replica under load", lambda: len(outcome.replicas) == 2)
    load.clients = max(1, load.clients // _FEW)
    await server.until("one replica with few clients", lambda: len(_pids(server)) == 1)


async def roll(server: Server, after: float, load: Load, outcome: Outcome) -> None:
    """The replicas are replaced, one after another."""
    await asyncio.sleep(after)
    before = _pids(server)
    server.process.send_signal(signal.SIGUSR1)
    await server.until("the replacement of all replicas", lambda: "the replicas were replaced" in server.log)
    await server.until("the end of the old replicas", lambda: not before & _pids(server))


def _pids(server: Server) -> set[int]:
    return {process.pid for process in server.replicas()}


@dataclass(frozen=True)
class Side:
    """Attributes:
    replicas: their number; 0: `dso serve` without Ray.
    options: further ones of `dso serve`.
    event: what happens while clients go on.
    """

    replicas: int
    options: tuple[str, ...] = ()
    event: Any = None


SIDES: Mapping[str, Side] = {
    "server": Side(0),
    "ray1": Side(1),
    "ray2": Side(2),
    "ray2-killed": Side(2, event=kill),
    "ray2-scaled": Side(1, ("--max-replicas", "2", "--scale-down-after", str(_DOWN_AFTER)), scale),
    "ray2-rolled": Side(2, event=roll),
}
IN_TURNS = ("server", "ray1")


def measure(model: str, name: str, a: argparse.Namespace, further: list[str]) -> Row:
    """A fresh server, its clients, and the end of the server."""
    side = SIDES[name]
    cores = ["--threads", str(a.cores)] if not side.replicas else ["--replica-cpus", str(a.cores)]
    on_ray = ["--ray", "--replicas", str(side.replicas)] if side.replicas else []
    begin = time.monotonic()
    with _started(name, [model, *cores, *on_ray, *side.options, *further]) as server:
        run = lambda *load, **more: asyncio.run(drive(server.url, Load(*load), **more))  # noqa: E731
        run(4, 1, 8, seed=1)  # warms it up
        event = None if side.event is None else partial(side.event, server, a.after)
        outcome = run(a.clients, a.turns, a.tokens, event=event)
        alone = run(1, a.alone, 4, seed=2)
    return {"side": name, **outcome.row(), "alone_ms": round(alone.first_ms, 2), "seconds": round(time.monotonic() - begin)}


@contextmanager
def _started(name: str, options: Sequence[str]) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("dso")), "serve", *options, "--port", str(port)]
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        server = Server(process, f"http://127.0.0.1:{port}", Path(log.name))
        try:
            end = time.monotonic() + _START
            while "address   " not in server.log:
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{name} did not start:\n{server.log[-3000:]}")
                time.sleep(_LOOK)
            yield server
            process.send_signal(signal.SIGTERM)
            process.wait(120)
        finally:
            left = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.kill()
            for one in left:
                with suppress(psutil.Error):  # it ended with the server
                    one.kill()


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line for each bar whose sides were measured."""
    by = {name: [row for row in rows if row["side"] == name] for name in SIDES}
    lines = []

    def say(reached: bool, text: str) -> None:
        lines.append(f"{REACHED if reached else MISSED}: {text}")

    if by["server"] and by["ray1"]:
        pairs = list(zip(by["server"], by["ray1"], strict=False))
        shares = [ray["tokens_per_s"] / server["tokens_per_s"] for server, ray in pairs]
        later = [ray["alone_ms"] - server["alone_ms"] for server, ray in pairs]
        share, ms = statistics.median(shares), statistics.median(later)
        say(share >= THROUGHPUT, f"throughput of ray1 {share:.3f} of server's ({min(shares):.3f} - {max(shares):.3f})")
        say(ms <= FIRST_MS, f"first token of ray1 {ms:+.1f} ms ({min(later):+.1f} - {max(later):+.1f}), one client")
    if by["ray1"] and by["ray2"]:
        one, two = (statistics.median(row["cached_share"] for row in by[name]) for name in ("ray1", "ray2"))
        say(two >= HITS * one, f"prefix hits of ray2 {two / one:.1%} of ray1's ({two:.1%} and {one:.1%} of prompt tokens)")
    for name, side in SIDES.items():
        if side.replicas and by[name]:
            left, sent = sum(row["unanswered"] for row in by[name]), sum(sum(row["ended"].values()) for row in by[name])
            say(left == 0, f"{name}: {sent} requests, {left} of them not answered")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="path or name of a model; further options are those of `dso serve`")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=3, help=f"of {' and '.join(IN_TURNS)}, in turns (default 3)")
    parser.add_argument("--cores", type=int, default=1, help="of the server, and of each replica (default 1)")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--turns", type=int, default=4, help="of a conversation (default 4)")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer (default 32)")
    parser.add_argument("--alone", type=int, default=20, help="requests of one client without other load (default 20)")
    parser.add_argument("--after", type=float, default=10.0, metavar="SECONDS", help="until replicas are killed or replaced")
    parser.add_argument("--json", action="store_true")
    a, further = parser.parse_known_args()
    turns = [name for name in a.sides if name in IN_TURNS]
    order = [name for turn in range(a.rounds) for name in (turns if turn % 2 == 0 else turns[::-1])]
    rows = []
    for name in [*order, *(name for name in a.sides if name not in IN_TURNS)]:
        rows.append(row := measure(a.model, name, a, further))
        if a.json:
            print(json.dumps(row), flush=True)
        else:
            first = f"first token {row['first_token_ms']:>8} ms, alone {row['alone_ms']:>6} ms"
            rest = f"cached {row['cached_share']:.1%}   {row['ended']}   per replica {row['replicas']}   {row['seconds']} s"
            print(f"{name:12} {row['tokens_per_s']:>8} tokens/s   {first}   {rest}", flush=True)
    lines = verdicts(rows)
    print("\n".join(lines), file=sys.stderr if a.json else sys.stdout)
    raise SystemExit(any(line.startswith(MISSED) for line in lines))


if __name__ == "__main__":
    main()
