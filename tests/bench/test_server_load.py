"""Load on a server: of this package, on a scripted engine, and of others by scripted replies."""

from __future__ import annotations

import random

import pytest

from deepseek_optimizer.bench.http_client import Address
from deepseek_optimizer.bench.random_texts import TokenCount, random_text
from deepseek_optimizer.bench.server_load import LoadRequest, run
from deepseek_optimizer.bench.server_report import sections
from deepseek_optimizer.chat.remote import RemoteError
from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.server.keys import ApiKeys
from deepseek_optimizer.server.settings import ServerSettings
from support.fake_engine import FakeEngine
from support.live_server import LiveServer


def words(request):
    return "word " * 40


@pytest.fixture(scope="module")
def live(byte_tokenizer):
    engine = FakeEngine(byte_tokenizer, words, step_seconds=0.001)
    with LiveServer(engine, ServerSettings(keys=ApiKeys(["secret"]))) as live:
        yield live


def load(live, **fields):
    return run(LoadRequest(live.url, **{"key": "secret", "prompt": 200, "new": 24, "requests": 6, "concurrency": 3} | fields))


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_figures_of_a_server(live, endpoint):
    live.engine.seen.clear()
    seen = []
    report = run(
        LoadRequest(live.url, "secret", prompt=200, new=24, requests=6, concurrency=3, endpoint=endpoint),
        lambda done, total: seen.append((done, total)),
    )
    assert seen == [(n, 6) for n in range(1, 7)]
    assert report["completed"] == 6 and report["failed"] == 0 and report["output_tokens"] == 6 * 24
    prompts = [len(request.prompt) for request in live.engine.seen[2:]]
    assert report["prompt_tokens"] == sum(prompts) and all(150 < count < 250 for count in prompts)
    assert len({tuple(request.prompt[:60]) for request in live.engine.seen}) == 8 or endpoint == "chat"
    assert all(request.sampling.ignore_eos and request.sampling.max_tokens == 24 for request in live.engine.seen[2:])
    figures = report["figures"]
    assert set(figures) == {"ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"} and figures["ttft_ms"]["n"] == 6
    assert 0 < figures["ttft_ms"]["p50"] < figures["e2e_ms"]["p50"] and figures["ttft_ms"]["p99"] is None
    assert report["totals"]["output_tok_s"] == pytest.approx(24 * report["totals"]["requests_s"])
    assert report["settings"]["model"] == "fake-model" and "key" not in report["settings"] and report["tokens_were_counted"]
    tables = list(sections(report))
    assert [table.title for table in tables] == ["Server", "Times"] and not tables[0].warning


def test_at_most_so_many_requests_at_once(live):
    most, admit = [], live.engine.admit

    def counted(*arguments):
        most.append(live.engine.admitted + 1)
        return admit(*arguments)

    live.engine.admit = counted
    try:
        load(live, requests=12, concurrency=2)
    finally:
        live.engine.admit = admit
    assert max(most) == 2 and len(most) == 14


def test_arrivals_at_a_rate(live):
    arrivals = random.Random(4)
    report = load(live, requests=8, concurrency=8, rate=50.0, seed=3)
    assert report["settings"]["seed"] == 3 and report["completed"] == 8
    assert report["seconds"] >= sum(arrivals.expovariate(50.0) for _ in range(8))


def test_requests_that_fail_are_counted_by_reason(live):
    capacity, live.engine.capacity = live.engine.capacity, 1
    try:
        report = load(live, requests=10, concurrency=10)
    finally:
        live.engine.capacity = capacity
    assert report["completed"] >= 1 and report["completed"] + report["failed"] == 10 and report["failed"] > 0
    ((reason, count),) = report["failures"].items()
    assert count == report["failed"] and reason.startswith("status ")
    tables = list(sections(report))
    assert "requests failed" in tables[0].warning and tables[-1].rows == ((reason, str(count)),)


def test_a_server_that_cannot_be_measured(live):
    with pytest.raises(RemoteError, match="API key"):
        load(live, key="wrong")
    with pytest.raises(RemoteError, match="127.0.0.1:9"):
        run(LoadRequest("http://127.0.0.1:9"))
    with pytest.raises(RemoteError, match="refused a request: status 404"):
        load(live, model="another")
    for fields in ({"prompt": 0}, {"new": 0}, {"concurrency": 0}, {"requests": 0}, {"rate": 0.0}, {"endpoint": "embeddings"}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            LoadRequest("http://localhost:1", **fields)


def test_words_for_a_number_of_tokens():
    count = TokenCount.of((16, 52), (144, 308))  # 20 tokens of the template, 2 for a word
    assert (count.fixed, count.per_word) == (20, 2) and count.words(512) == 246 and count.words(3) == 1
    texts = {random_text(20, random.Random(seed)) for seed in range(50)}
    assert len({text[:20] for text in texts}) == 50 and all(len(text.split()) == 20 for text in texts)


def test_addresses():
    assert Address.of("http://host:80/v1/") == Address("host", 80, False, "/v1")
    assert Address.of("https://example.com") == Address("example.com", 443, True)
    assert Address.of("http://[::1]:8000/v1").host == "::1"
