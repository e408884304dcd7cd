"""Far more clients than the server has slots for, on a real model, over real sockets: `dso serve` in its own process.

Every request gets exactly one correct answer even if other clients leave or read slowly; no resource leaks. Also: how a server
stops under such load.
"""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deepseek_optimizer.bench.http_client import Exchange, HttpReply, ask, reply_of, request_bytes, send
from deepseek_optimizer.bench.served import Served
from deepseek_optimizer.system.open_files import raise_file_limit
from support.live_server import wait_for

REQUESTS, CANCELLED = 1_000, 100
RUNNING, WAITING = 16, 256  # slots: for a quarter of the concurrent requests
SERVED = ("--precision", "int8", "--max-running", str(RUNNING), "--max-waiting", str(WAITING))
CACHE = 20 * 8192  # bytes: fewer blocks than 16 of these requests can use, so that some may be preempted
ALLOWANCE = 4 << 20  # bytes that a burst may add after the first two: Python's garbage of one exists during the next
PATH = "/v1/completions"


def bodies(count: int, seed: int = 0) -> list[dict]:
    """Greedy requests of many lengths; some prompts have a common prefix, and some are equal."""
    rng = random.Random(seed)
    openings = ["", "The same long beginning, of two blocks and more. " * 2, "Another one: "]
    result = []
    for _ in range(count):
        prompt = rng.choice(openings) + " ".join(f"{rng.randrange(200)}" for _ in range(rng.randrange(1, 12)))
        tokens = rng.choice([rng.randrange(1, 20), rng.randrange(1, 20), 90])
        result.append({"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": rng.random() < 0.5})
    return result


@pytest.fixture(scope="module")
def offline(tiny_model):
    """offline(bodies): the texts of the offline engine, each prompt alone, without shared blocks or drafts."""
    from transformers import AutoTokenizer

    from deepseek_optimizer import load_model
    from deepseek_optimizer.engine.request import SamplingParams
    from deepseek_optimizer.serving import make_engine

    model = load_model(tiny_model, precision="int8", threads=1)
    engine = make_engine(model, AutoTokenizer.from_pretrained(tiny_model), drafts=False, prefix_cache=False)
    known: dict[tuple[str, int], str] = {}

    def texts(requested: list[dict]) -> list[str]:
        for body in requested:
            key = (body["prompt"], body["max_tokens"])
            if key not in known:
                params = SamplingParams(temperature=0, max_tokens=key[1], ignore_eos=body.get("ignore_eos", False))
                known[key] = engine.generate([key[0]], params)[0].text
        return [known[body["prompt"], body["max_tokens"]] for body in requested]

    return texts


@dataclass
class Outcome:
    """The results of a burst's clients."""

    replies: list[list[HttpReply]] = field(default_factory=list)  # the replies of each request that were not rejections
    refused: int = 0


async def burst(server: Served, requested: list[dict], leaving: set[int], slow: int, seed: int) -> Outcome:
    """Sends all requests concurrently; rejected clients retry after the time that the server gave."""
    rng = random.Random(seed)
    outcome = Outcome([[] for _ in requested])
    patience = [rng.random() ** 2 for _ in requested]  # seconds until clients disconnect

    async def client(i: int) -> None:
        while True:
            exchange = await send(server.port, PATH, requested[i])
            if i in leaving:
                await asyncio.sleep(patience[i])
                exchange.leave()
            reply = await exchange.reply()
            if reply.status != 429:
                outcome.replies[i].append(reply)
                return
            outcome.refused += 1
            assert reply.json()["error"]["code"] == "queue_full" and reply.retry_after >= 1
            await asyncio.sleep(reply.retry_after + rng.random() / 2)

    async def slow_client() -> None:
        """Reads one byte at a time for a while, with the smallest receive window."""
        while True:
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                sock.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(sock, ("127.0.0.1", server.port))
                await loop.sock_sendall(sock, request_bytes(PATH, requested[slow]))
                pieces: list[tuple[float, bytes]] = []
                while piece := await loop.sock_recv(sock, 1 if len(pieces) < 500 else 65_536):
                    pieces.append((time.perf_counter(), piece))
                    await asyncio.sleep(0.005)
            reply = reply_of(pieces)
            if reply.status != 429:
                outcome.replies[slow].append(reply)
                return
            await asyncio.sleep(reply.retry_after)

    await asyncio.wait_for(asyncio.gather(*(client(i) for i in range(len(requested)) if i != slow), slow_client()), 240)
    return outcome


def assert_idle(server: Served) -> None:
    """Asserts that no request is running and no block is allocated."""
    names = ("dso:requests_admitted", "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")

    def idle() -> bool:
        result = server.metrics()
        return not any(result[name] for name in names)

    wait_for(idle)


@pytest.fixture(scope="module")
def server(tiny_model):
    raise_file_limit()
    with Served(tiny_model, *SERVED, "--kv-cache-memory", str(CACHE)) as running:
        yield running
        running.__exit__()
        assert running.process.returncode == 0


def test_a_thousand_at_once(server, offline):
    """Three times, so that leaks would be visible."""
    requested = bodies(REQUESTS)
    rng = random.Random(1)
    leaving = set(rng.sample(range(REQUESTS), CANCELLED))
    slow = next(i for i in range(REQUESTS) if i not in leaving and requested[i]["stream"] and requested[i]["max_tokens"] > 40)
    baseline = {"prompt": "A question of its own", "max_tokens": 40, "temperature": 0}
    right, alone = offline(requested), asyncio.run(ask(server.port, PATH, baseline)).json()["choices"]
    assert alone[0]["text"] == offline([baseline])[0]
    resident = []
    for seed in range(3):
        before = server.metrics()
        outcome = asyncio.run(burst(server, requested, leaving, slow, seed))
        answered = 0
        for i, replies in enumerate(outcome.replies):
            assert len(replies) == 1, f"request {i} has {len(replies)} answers"
            reply = replies[0]
            if i in leaving and not reply.whole:
                assert reply.status in (0, 200)
                continue
            answered += 1
            assert reply.status == 200 and reply.whole and (reply.done or not requested[i]["stream"])
            assert reply.text == right[i], f"request {i}"
        assert_idle(server)
        after = server.metrics()
        ended = after["vllm:request_success_total"] - before.get("vllm:request_success_total", 0)
        assert REQUESTS - CANCELLED <= answered <= ended <= REQUESTS
        assert outcome.refused  # there were more requests than the queue admits
        left = ("vllm:request_success_total{finished_reason=cancelled}", "dso:queue_jobs_total{outcome=left}")
        assert sum(after.get(name, 0) for name in left) > 0  # cancelled in the engine, or before they reached it
        assert not after.get("vllm:request_success_total{finished_reason=error}", 0)
        assert asyncio.run(ask(server.port, PATH, baseline)).json()["choices"] == alone
        resident.append(server.resident_bytes)
    assert resident[2] - resident[1] <= ALLOWANCE, f"{resident} bytes"
    assert server.get("/health") == {"status": "ok"}


# Shutdown.

STREAMS = 120


@pytest.fixture
def own_server(tiny_model):
    with Served(tiny_model, *SERVED, "--max-running", "4") as running:
        yield running


async def streams(server: Served, requested: list[dict]) -> list[Exchange]:
    """Opens streams; all of them are admitted."""
    opened = [await send(server.port, PATH, body) for body in requested]
    while server.metrics()["dso:requests_admitted"] + sum(exchange.over for exchange in opened) < len(requested):
        await asyncio.sleep(0.01)
    return opened


def stopping(server: Served) -> bool:
    return "stopping" in server.log


def long_bodies() -> list[dict]:
    return [
        {"prompt": f"Stream {i}", "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
        for i in range(STREAMS)
    ]


def test_sigterm_under_load_drains(own_server, offline):
    """Running and queued requests get a complete answer; new ones get the error that the server is stopping."""
    requested = long_bodies()

    async def main() -> tuple[list[HttpReply], HttpReply | None]:
        opened = await streams(own_server, requested)
        own_server.process.send_signal(signal.SIGTERM)
        while not stopping(own_server):
            await asyncio.sleep(0.01)
        assert any(exchange.received == 0 for exchange in opened)  # some had not started
        try:
            late = await ask(own_server.port, PATH, {"prompt": "late", "max_tokens": 1})
        except OSError:
            late = None
        return [await exchange.reply() for exchange in opened], late

    replies, late = asyncio.run(main())
    assert late is None or late.status == 503 and "retry-after" in late.headers
    assert [reply.done for reply in replies] == [True] * STREAMS
    assert [reply.text for reply in replies] == offline(requested)
    assert own_server.process.wait(15) == 0
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", own_server.port), 5)


def test_a_second_sigterm_ends_it_at_once(own_server):
    """During streams, with worker processes for chats and grammars running: none of them outlives the server."""
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "response_format": {"type": "json_object"}}
    assert asyncio.run(ask(own_server.port, "/v1/chat/completions", chat)).status == 200
    children = own_server.children
    assert children

    async def main() -> float:
        opened = await streams(own_server, long_bodies())
        own_server.process.send_signal(signal.SIGTERM)
        while not stopping(own_server):
            await asyncio.sleep(0.01)
        assert own_server.process.poll() is None
        began = time.monotonic()
        own_server.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(own_server.process.wait, 5) == 128 + signal.SIGTERM
        assert not all([(await exchange.reply()).done for exchange in opened])
        return time.monotonic() - began

    assert asyncio.run(main()) < 5
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
