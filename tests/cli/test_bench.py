"""`dso bench`: end to end on a tiny model, and its errors."""

from __future__ import annotations

import json

import pytest

from deepseek_optimizer.bench import roofline
from deepseek_optimizer.bench.sides.load import load_side
from support.byte_tokenizer import new_byte_tokenizer
from support.multimodal import FAMILIES, make_model

SMALL = ("--prompt", "12", "--new", "4", "--repeats", "2", "--threads", "1")


@pytest.fixture(autouse=True)
def _quick_machine(monkeypatch):
    """Replaces the measurement of the machine, which is tested in tests/bench."""
    monkeypatch.setattr(roofline, "read_gb_s", lambda *_: 50.0)
    monkeypatch.setattr(roofline, "matrix_tera", lambda *_: {"bf16": 1.0})


def _report(result):
    return json.loads(result.stdout.splitlines()[-1])


def test_all_options_together(dso, tiny_model, tmp_path):
    pytest.importorskip("sacrebleu")
    text, pairs, page = tmp_path / "text", tmp_path / "pairs", tmp_path / "r.html"
    text.write_text("A text that the model reads, and the unoptimized one too. " * 4)
    pairs.write_text("Hello\tHello\n")
    result = dso(
        "bench", tiny_model, *SMALL, "--batch", "1,2", "--precision", "int8", "--price-per-hour", "2", "--text", text,
        "--text-tokens", "64", "--pairs", pairs, "--ablate", "--rounds", "1", "--against", "transformers",
        "--html", page, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = _report(result)
    assert [e["work"]["batch"] for e in report["works"]] == [1, 2]
    assert report["works"][0]["cost"]["blended"] > 0 and report["works"][0]["limits"]["matrix_percent"] > 0
    assert report["quality"]["tokens"] == 64 and 0 < report["quality"]["kl_mean"] < 0.1
    assert report["pairs"]["pairs"] == 1
    assert len({row["variant"] for row in report["ablation"]}) >= 3
    assert {row["work"]["batch"] for row in report["against"]} == {1, 2} and all(row["better"] > 0 for row in report["against"])
    assert "first token, ms" in result.stdout and page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("family", ["qwen3_5", "gemma4", "qwen2_5_vl", "gemma3"])
def test_the_language_model_of_a_multimodal_checkpoint(dso, family, tmp_path):
    make_model(FAMILIES[family], vocab_size=270).save_pretrained(tmp_path)
    new_byte_tokenizer().save_pretrained(tmp_path)
    text = tmp_path / "text"
    text.write_text("A text that the model reads, and the unoptimized one too. " * 4)
    ablation = ("--ablate", "--rounds", "1") if family == "qwen2_5_vl" else ()
    result = dso("bench", tmp_path, *SMALL, "--text", text, "--text-tokens", "64", *ablation, "--json")
    assert result.exit_code == 0, result.output
    report = _report(result)
    assert report["works"][0]["figures"]["decode_tok_s"]["samples"] and report["config"]["precision"] == "auto"
    side = load_side("optimized", tmp_path, threads=1, config={}).model
    assert side.report().threads == 1
    assert report["works"][0]["limits"]["token_bytes"] > 0 and report["quality"]["kl_mean"] < 1e-3


def test_a_baseline_decides_the_exit_code(dso, tiny_model, tmp_path):
    first = dso("bench", tiny_model, *SMALL, "--json")
    assert first.exit_code == 0, first.output
    report = _report(first)
    for factor, code in ((1e-3, 0), (1e3, 1)):  # a thousand times slower, or faster
        old = json.loads(json.dumps(report))
        figure = old["works"][0]["figures"]["decode_tok_s"]
        figure["samples"] = [s * factor for s in figure["samples"]]
        for name in ("ttft_ms", "tpot_ms", "prefill_tok_s", "output_tok_s"):
            del old["works"][0]["figures"][name]
        old["memory_bytes"] = None
        file = tmp_path / "baseline.json"
        file.write_text(json.dumps(old))
        again = dso("bench", tiny_model, *SMALL, "--baseline", file, "--json")
        assert again.exit_code == code, again.output
        assert _report(again)["baseline"][0]["regressed"] == bool(code)

    file.write_text(json.dumps({**report, "cpu": "another"}))
    refused = dso("bench", tiny_model, *SMALL, "--baseline", file)
    assert refused.exit_code == 2 and "another cpu" in refused.stderr and "12 in" not in refused.stderr  # before measuring


def test_peak_memory_excludes_measuring_the_machine(dso, tiny_model, monkeypatch):
    size = 512 << 20
    monkeypatch.setattr(roofline, "read_gb_s", lambda *_: float(len(b"x" * size)))  # written, so resident
    memory = _report(dso("bench", tiny_model, *SMALL, "--json"))["memory_bytes"]
    assert memory is None or memory < size / 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt", "12;13"], "commas"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--prompt", "300"], "context"),
        (["--against", "nobody"], "unknown peer 'nobody'"),
        (["--against", "transformers", "--peer-model", "llama.cpp=x"], "is not in --against"),
        (["--peer-model", "x"], "ENGINE=PATH"),
    ],
)
def test_errors_are_one_line(dso, tiny_model, options, message):
    result = dso("bench", tiny_model, "--threads", "1", *options)
    assert result.exit_code == 2 and message in result.stderr.splitlines()[-1]


def test_a_missing_peer_names_the_setup_command(dso, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = dso("bench", tiny_model, "--against", "llama.cpp")
    assert result.exit_code == 2 and "--setup-peers --against llama.cpp" in result.stderr


def test_setting_up_a_peer_that_needs_nothing(dso):
    result = dso("bench", "--setup-peers", "--against", "transformers")
    assert result.exit_code == 0 and result.stdout.startswith("transformers: ")
    assert dso("bench").exit_code == 2
