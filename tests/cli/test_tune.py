"""`dso tune`: one real search on a tiny model, and its errors."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from deepseek_optimizer import load_model, optimized_model
from deepseek_optimizer.backends import cpu
from deepseek_optimizer.backends.cpu import native
from deepseek_optimizer.backends.cuda import cost_table, tuning
from deepseek_optimizer.backends.cuda.alternative import Choice
from deepseek_optimizer.backends.cuda.division import DEFAULT
from deepseek_optimizer.profiles import find, read
from deepseek_optimizer.system import processor
from deepseek_optimizer.tune import kernels
from deepseek_optimizer.tune import search as searches
from deepseek_optimizer.tune.search import Found, Trial
from deepseek_optimizer.tune.settings import Figures


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
    assert report["predictions"]["steps"] > 0 and report["prediction_error"] is None or report["prediction_error"] >= 0
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


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="needs the native backend")
def test_formats_of_weights(dso, tiny_model, tmp_path, monkeypatch):
    """A precision that is found goes into the profile, and a model that is packed in one format has no others."""
    pytest.importorskip("optuna")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen, precision, trace = [], "int4", tmp_path / "trace.jsonl"
    trace.write_text('{"prompt_tokens": 20, "new_tokens": 2}')

    def search(measure, model, values, defaults, goal, **options):
        seen.append((values["precision"], options["kl_budget"]))
        best = replace(defaults, precision=precision if precision in values["precision"] else "auto")
        replays = measure(best)
        figures = next(replays)
        replays.close()
        return Found(best, defaults, 0.5, figures, figures, [Trial(best, figures)])

    monkeypatch.setattr(searches, "search", search)
    assert dso("tune", tiny_model, "--trace", trace, "--kl-budget", "0.5").exit_code == 0
    assert seen == [(("auto", "int8", "q4_1", "int4"), 0.5)]
    assert load_model(tiny_model, profile="auto").dso.config.precision == precision
    assert not list((tmp_path / "cache" / "deepseek-optimizer").glob("tune-*"))
    packed = tmp_path / "packed"
    assert dso("convert", tiny_model, packed, "--precision", precision).exit_code == 0
    result = dso("tune", packed, "--trace", trace, "--kl-budget", "0.5")
    assert result.exit_code == 0 and "formats of weights are not searched, since packed is packed in" in result.stderr
    assert seen[1:] == [(("auto",), 0.5)]


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="needs the native backend")
def test_the_defaults_are_those_of_a_model(dso, tiny_model, tmp_path, monkeypatch):
    """A control group with a quota of 2 on a machine with many processors: profiles without threads are loaded with 2."""
    pytest.importorskip("optuna")
    monkeypatch.setattr(native, "default_threads", lambda: 2)
    monkeypatch.setattr(processor, "usable_cpus", lambda: 64)
    seen = []

    def search(measure, model, values, defaults, goal, **options):
        seen.append((values["threads"], defaults.threads))
        figures = Figures(1.0, 1.0, 1.0, 1.0)
        return Found(defaults, defaults, 0.0, figures, figures, [Trial(defaults, figures)])

    monkeypatch.setattr(searches, "search", search)
    saved = tmp_path / "p.json"
    assert dso("tune", tiny_model, "-o", saved).exit_code == 0
    assert seen[0][1] == load_model(tiny_model, profile=saved).dso.backend.threads == 2
    assert 2 in seen[0][0] and 64 not in seen[0][0] and read(saved).fields == {}
    monkeypatch.setenv("DSO_THREADS", "1")  # models that are loaded later take it, too
    assert dso("tune", tiny_model, "-o", saved).exit_code == 0 and seen[1][1] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--goal", "beauty"), "--goal must be one of latency, throughput, memory"),
        (("--threads", "2"), "--threads is searched; leave it out"),
        (("--trace", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--device", "cuda"), "--device is for --kernels: settings are searched for the CPU"),
        (("--activation", "fp8"), "--activation is for --kernels"),
    ],
)
def test_errors_before_loading(dso, options, message):
    result = dso("tune", "no-model", *options)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_kernels(dso, monkeypatch, tmp_path):
    """What is found is shown; the search itself needs a card."""
    gains, chosen, loaded = [tuning.Gain("tile_warps", 4, 8, 0.25)], [Choice("scaled_mm", 64, "2.13.0")], {}

    def load(model, **options):
        loaded.update(options, model=model)
        return SimpleNamespace(device="cuda:0")

    monkeypatch.setattr(optimized_model, "load_model", load)
    monkeypatch.setattr(cost_table, "card_of", lambda device: device)
    found = lambda model, card, note: kernels.TunedKernels(DEFAULT, DEFAULT, gains, chosen, tmp_path / "found.json")  # noqa: E731
    monkeypatch.setattr(kernels, "tune_kernels", found)
    result = dso("tune", "a-model", "--kernels", "--precision", "int4")
    assert result.exit_code == 0 and "tile_warps: 4 -> 8, 25.0% faster" in result.stdout
    assert f"written to {tmp_path / 'found.json'}" in result.stdout.replace("\n", "")
    assert loaded == {"model": "a-model", "device": "cuda", "backend": "cuda", "precision": "int4"}
    assert "scaled_mm: used from 64 rows of a step on" in result.stdout
    gains.clear()
    dso("tune", "a-model", "--kernels", "--activation", "fp8")
    assert loaded["activation"] == "fp8"
    assert "nothing is faster" not in dso("tune", "a-model", "--kernels").stdout
    chosen.clear()
    assert "nothing is faster than before" in dso("tune", "a-model", "--kernels").stdout
    assert json.loads(dso("tune", "a-model", "--kernels", "--json").stdout.splitlines()[-1])["gains"] == []
