"""The soak test beside a hostile client for two seconds on a tiny model, proof that it detects faults, and hostile requests."""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks" / "soak.py").exists():
    pytest.skip("the benchmarks are not part of the package", allow_module_level=True)
sys.path.append(str(ROOT))

from benchmarks import attacks, hostile, soak  # noqa: E402

from deepseek_optimizer.bench.served import parsed  # noqa: E402
from deepseek_optimizer.server.keys import ApiKeys  # noqa: E402
from deepseek_optimizer.server.settings import ServerSettings  # noqa: E402
from support.live_server import LiveServer  # noqa: E402


class Server:
    """The values that `soak.soak` observes, from a server in this process."""

    log, children, resident_bytes = "", (), 10**8

    def __init__(self, live: LiveServer) -> None:
        self._live, self.port = live, live.port

    def metrics(self) -> dict[str, float]:
        return parsed(self._live.client.get("/metrics", headers={"Authorization": "Bearer good"}).text)


@pytest.fixture(scope="module")
def live(soaked_engine):
    settings = ServerSettings(keys=ApiKeys(["good", "bad"]))
    with LiveServer(soaked_engine, settings) as running:
        yield running


def honest(live: LiveServer) -> soak.Honest:
    return soak.Honest(live.port, ["good"], [one for one in soak.questions(6) if one.kind in ("chat", "stream", "text")][:5])


def test_two_seconds_for_real(live, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    clients = honest(live)
    assert asyncio.run(soak.soak(Server(live), clients, "bad", 4, 3.0, "prompts")) == []
    assert clients.answered == clients.sent and clients.answered.total() > 5
    out = capsys.readouterr().out
    assert "answered rightly" in out and "hostile    400" in out


def test_a_changed_text_is_detected(live):
    clients = honest(live)
    clients.expected = ["what it never says"] * len(clients.asked)

    async def one_request():
        until = soak.time.monotonic() + 0.05
        await clients.run(1, until)

    asyncio.run(one_request())
    assert clients.failures and "and alone 'what it never says'" in clients.failures[0]


def test_problems_are_reported():
    clients = soak.Honest(1, ["good"], [])
    clients.sent, clients.answered, clients.times = Counter(chat=5), Counter(chat=5), [1.0] * 5
    flat = soak.Memory([(float(n), 100, 100 + n % 2) for n in range(0, 1800, 2)])
    growing = soak.Memory([(float(n), 10_000 + n, 100) for n in range(0, 1800, 2)])
    assert soak.report(clients, {"400": 3, "left": 1}, flat, 2, [], 1200.0, "") == []
    assert "grew by" in soak.report(clients, {"400": 3}, growing, 2, [], 1200.0, "")[0]
    assert "500" in soak.report(clients, {"500": 1}, flat, 2, [], 1200.0, "")[0]
    assert "got no answer" in soak.report(clients, {}, flat, 2, [], 1200.0, "")[0]
    assert "left behind" in soak.report(clients, {"400": 3}, flat, 2, ["a block"], 1200.0, "")[0]
    assert "traceback" in soak.report(clients, {"400": 3}, flat, 2, [], 1200.0, "Traceback (most")[0]
    clients.sent["chat"] += 1
    assert "6 requests were sent, and 5 answered" in soak.report(clients, {"400": 3}, flat, 2, [], 1200.0, "")[0]


def test_requests_of_hostile_clients(monkeypatch):
    monkeypatch.setattr(hostile, "_PARAGRAPHS", 1000)
    made = {kind: make(random.Random(0))("a-key") for kind, (make, _) in hostile.KINDS.items()}
    assert all(b"Authorization: Bearer a-key\r\n" in request for request in made.values())
    assert len(made["prompts"]) > 3_800_000 and len(made["fitting"]) > 600_000
    assert hostile.schemas(random.Random(0))("k") != hostile.schemas(random.Random(1))("k")
    head, _, content = made["documents"].partition(b"\r\n\r\n")
    assert f"Content-Length: {len(content)}".encode() in head


def test_percentiles_and_ratios():
    assert attacks.percentile([float(n) for n in range(100)]) == 95.0 and attacks.percentile([1.0]) == 1.0
    assert attacks.Row("prompts", "chat", 0.1, 0.2, 0.3, {}).ratio == 2.0
    assert all("response_format" in attacks.body("schema") or kind != "schema" for kind in ("chat", "schema", "file"))
