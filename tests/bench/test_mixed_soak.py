"""The mixed soak test for two seconds on a tiny model, and proof that it detects faults."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks" / "mixed_soak.py").exists():
    pytest.skip("the benchmarks are not part of the package", allow_module_level=True)
sys.path.append(str(ROOT))

from benchmarks import mixed_soak as soak  # noqa: E402

from deepseek_optimizer.bench.http_client import HttpReply  # noqa: E402
from deepseek_optimizer.bench.served import parsed  # noqa: E402
from support.live_server import LiveServer  # noqa: E402

KINDS = {"again", "chat", "left", "pattern", "schema", "text"}


class Server:
    """The values that `soak.run` observes, from a server in this process."""

    log = ""
    resident_bytes = 10**8

    def __init__(self, live: LiveServer) -> None:
        self._live = live

    def metrics(self) -> dict[str, float]:
        return parsed(self._live.client.get("/metrics").text)


@pytest.fixture(scope="module")
def live(soaked_engine):
    with LiveServer(soaked_engine) as running:
        yield running


def small(live: LiveServer) -> soak.Soak:
    return soak.Soak(live.port, 0, longest=(60, 20), vocabulary=250)


def test_two_seconds_for_real(live, capsys):
    leaning = small(live)
    assert soak.run(leaning, Server(live), 8, 2.0) == []
    assert set(leaning.done) >= {"text", "chat"} and leaning.tokens > 0
    assert "errors     0" in capsys.readouterr().out


def test_a_changed_text_is_detected(live, monkeypatch):
    monkeypatch.setattr(soak, "AGAIN", 1.0)  # requests of other kinds could take the whole second
    leaning = small(live)
    leaning.known = dict.fromkeys(map(str, range(8)), "what it never says")
    failures = soak.run(leaning, Server(live), 8, 1.0)
    assert failures and all(failure.startswith("again: answered") for failure in failures)


class Leaking(Server):
    """Grows with every observation, and leaks a block."""

    log = "Traceback (most recent call last)"
    sizes = iter([10**8, 2 * 10**8])

    @property
    def resident_bytes(self) -> int:
        return next(self.sizes)

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "vllm:kv_cache_usage_perc": 0.01}


def test_leaks_are_detected(live, monkeypatch):
    monkeypatch.setattr(soak, "FULL", 0.0)
    monkeypatch.setattr(soak, "SETTLE", 0.2)
    failures = soak.run(small(live), Leaking(live), 1, 0.2)
    assert [failure.split(":")[0] for failure in failures] == [
        "memory grew from 100 to 200 MB", "left behind", "the server's log has a traceback"
    ]  # fmt: skip


def test_a_missing_server_is_detected(live):
    leaning = soak.Soak(1, 0)
    with pytest.raises(OSError):
        soak.run(leaning, Server(live), 2, 0.2)
    assert leaning.failures and all("ConnectionRefusedError" in failure for failure in leaning.failures)


def test_requests_are_of_all_kinds():
    rng, leaning = random.Random(0), soak.Soak(1, 0)
    kinds = Counter(leaning.request(rng).kind for _ in range(2000))
    assert set(kinds) == KINDS - {"left"} and min(kinds.values()) > 50


def answer(text: str, finish: str = "stop", status: int = 200, whole: bool = True, tokens: int = 3) -> HttpReply:
    body = {"choices": [{"index": 0, "text": text, "finish_reason": finish}], "usage": {"completion_tokens": tokens}}
    return HttpReply(status, {"content-type": "application/json"}, json.dumps(body).encode(), whole=whole)


@pytest.mark.parametrize(
    "check, good, bad",
    [
        (soak._matches, "123-abc", "123-xyz"),
        (soak._fits, '{"city": "Rome", "people": 3}', '{"city": "Rome", "people": 300}'),
        (soak._fits, '{"people": 1, "city": "Bonn"}', '{"people": 1, "city": "Bonn"'),
        (soak._count(3), "x", None),
    ],
)
def test_answers_are_checked(check, good, bad):
    assert check(answer(good)) == ""
    assert check(answer(bad or "x", tokens=2))
    assert bad is None or check(answer(bad, "length")) == ""  # it was truncated


def test_rejections_and_incomplete_answers_are_failures():
    leaning, requested = soak.Soak(1, 0), soak.Asked("text", "/", {}, lambda reply: "")
    assert leaning._wrong(requested, answer("x")) == ""
    assert "refused" in leaning._wrong(requested, answer("x", status=500))
    assert "broke off" in leaning._wrong(requested, answer("x", whole=False))
