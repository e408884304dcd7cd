"""The clients of the replicas' benchmark at a real server, and its verdicts. Ray is in `tests/interop/test_ray.py`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks" / "ray_replicas.py").exists():
    pytest.skip("the benchmarks are not part of the package", allow_module_level=True)
sys.path.append(str(ROOT))

from benchmarks.ray_clients import ANSWERED, CUT, Load, drive  # noqa: E402
from benchmarks.ray_replicas import verdicts  # noqa: E402

from deepseek_optimizer.server.settings import ServerSettings  # noqa: E402
from support.live_server import LiveServer  # noqa: E402


@pytest.fixture(scope="module")
def url(soaked_engine):
    with LiveServer(soaked_engine, ServerSettings()) as running:
        yield f"http://127.0.0.1:{running.port}"


def test_conversations_are_answered(url):
    outcome = asyncio.run(drive(url, Load(3, 2, 4)))
    row = outcome.row()
    assert row["ended"] == {ANSWERED: 6} and row["unanswered"] == 0 and outcome.tokens == 24
    assert 0 < row["cached_share"] < 1 and outcome.seconds > 0


def test_clients_go_on_until_something_has_happened_and_may_become_fewer(url):
    seen = []

    async def event(load, outcome):
        while outcome.ended.total() < 8:
            await asyncio.sleep(0.01)
        load.clients = 1
        seen.append(outcome.ended.total())
        while outcome.ended.total() < seen[0] + 8:
            await asyncio.sleep(0.01)

    outcome = asyncio.run(drive(url, Load(3, 2, 2), event))
    assert outcome.unanswered == 0 and outcome.ended[ANSWERED] >= seen[0] + 8


@pytest.mark.parametrize(
    ("events", "status", "first", "repeated"),
    [
        (b"", 503, "503", False),
        (b'data: {"error": {}}\n\n', 200, "an error before its first token", False),
        (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: {"error": {}}\n\n', 200, CUT, True),
        (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', 200, "not ended", False),
        (b"data: [DONE]\n\n", 200, "0 tokens instead of 4", False),
    ],
)
def test_other_ends_are_counted(events, status, first, repeated):
    """Only a request whose answer had begun is sent again."""
    usage = {"completion_tokens": 4, "prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 0}}
    whole = f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
    answers = [(status, events), (200, whole.encode())]

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        code, body = answers.pop(0)
        writer.write(b"HTTP/1.1 %d -\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % (code, len(body)) + body)
        await writer.drain()
        writer.close()

    async def run():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            return await drive(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", Load(1, 1, 4))

    outcome = asyncio.run(run())
    assert outcome.ended == ({first: 1, ANSWERED: 1} if repeated else {first: 1})
    assert outcome.unanswered == (0 if repeated else 1)


def row(side, tokens=100.0, alone=20.0, cached=0.5, ended=None, unanswered=0):
    return {
        "side": side, "tokens_per_s": tokens, "alone_ms": alone, "cached_share": cached, "ended": ended or {ANSWERED: 256},
        "unanswered": unanswered,
    }  # fmt: skip


def test_verdicts():
    good = [row("server"), row("ray1", 96, 24), row("ray1", 99, 23), row("server", 102), row("ray2", cached=0.46)]
    lines = verdicts([*good, row("ray2-rolled", ended={ANSWERED: 300, CUT: 2})])
    assert len(lines) == 6 and all(line.startswith("reached") for line in lines), lines
    bad = [row("server"), row("ray1", 90, 26), row("ray2", cached=0.44), row("ray2-killed", unanswered=1)]
    lines = verdicts(bad)
    assert [line.split(":")[0] for line in lines] == ["missed"] * 3 + ["reached"] * 2 + ["missed"]
    assert verdicts([row("server")]) == []
