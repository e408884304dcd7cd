"""`dso bench --url`: end to end on a scripted engine, and its errors."""

from __future__ import annotations

import json

import pytest

from support.fake_engine import FakeEngine
from support.live_server import LiveServer


@pytest.fixture(scope="module")
def url(byte_tokenizer):
    with LiveServer(FakeEngine(byte_tokenizer, lambda request: "word " * 10)) as live:
        yield live.url


def test_tables_and_json(dso, url):
    result = dso("bench", "--url", url, "--prompt", "100", "--new", "8", "--concurrency", "2", "--requests", "5", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["completed"] == 5 and report["output_tokens"] == 40 and report["figures"]["ttft_ms"]["p50"] > 0
    assert "first token, ms" in result.stdout and "fake-model" in result.stdout


def test_the_exit_code_tells_failures(dso, byte_tokenizer):
    engine = FakeEngine(byte_tokenizer, lambda request: "word " * 10, capacity=1, step_seconds=0.01)
    with LiveServer(engine) as live:
        result = dso("bench", "--url", live.url, "--prompt", "100", "--new", "8", "--concurrency", "6", "--requests", "6")
    assert result.exit_code == 1 and "of 6 requests failed" in " ".join(result.stdout.split()), result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--url", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["--url", "ftp://x"], "--url must be a URL"),
        (["--url", "http://h", "--quality"], "--quality cannot be combined with --url"),
        (["--url", "http://h", "--long"], "--long cannot be combined with --url"),
        (["model", "--url", "http://h"], "MODEL cannot be combined with --url"),
        (["model", "--rate", "2"], "--rate needs --url"),
        (["model", "--model", "x"], "--model needs --url"),
        (["--url", "http://h", "--prompt", "1,2"], "--prompt must be one number"),
        (["--url", "http://h", "--concurrency", "0"], "concurrency must be from 1"),
    ],
)
def test_errors_are_one_line(dso, options, message):
    result = dso("bench", *options)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr, result.output
