"""`dso tune`: one real search on a tiny model, and its errors."""

from __future__ import annotations

import json

import pytest

from deepseek_optimizer import load_model
from deepseek_optimizer.backends import cpu
from deepseek_optimizer.profiles import find, read


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="needs the native backend")
@pytest.mark.wide
def test_a_search(dso, tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trace, page = tmp_path / "trace.jsonl", tmp_path / "tune.html"
    lines = [{"at": n / 50, "prompt_tokens": 20, "new_tokens": 4, "group": "a", "shared_tokens": 8} for n in range(4)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--goal", "throughput", "--trace", trace, "--trials", "4", "--kl-budget", "1", "--html", page, "--json")
    result = dso("tune", tiny_model, *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert 1 <= len(report["trials"]) <= 4 and report["trials"][0]["settings"] == report["defaults"]
    assert report["default_figures"]["tok_s"] > 0 and report["requests"]["requests"] == 4
    assert page.read_text().startswith("<!doctype html>") and "<svg" in page.read_text()
    profile, _ = find(tiny_model, "auto", {})
    assert profile is not None and profile.goal == "throughput" and report["profile"] == profile.path
    tuned = load_model(tiny_model, profile="auto").dso.config
    assert tuned.prefill_chunk == dict(profile.fields).get("prefill_chunk", 512)
    saved = tmp_path / "mine.json"
    assert dso("tune", tiny_model, "--trace", trace, "--trials", "2", "-o", saved).exit_code == 0
    assert read(saved).goal == "latency"
    answer = dso("run", tiny_model, "Hello", "-n", "2", "--profile", saved)
    assert answer.exit_code == 0 and "dso: profile:" in answer.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--goal", "beauty"), "--goal must be one of latency, throughput, memory"),
        (("--threads", "2"), "--threads is searched; leave it out"),
        (("--trace", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_errors_before_loading(dso, options, message):
    result = dso("tune", "no-model", *options)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
