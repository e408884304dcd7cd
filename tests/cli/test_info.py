"""`dso info`: the machine, and with a model, how it was optimized."""

from __future__ import annotations

import json

from deepseek_optimizer.backends import cpu


def test_machine(dso):
    facts = json.loads(dso("info", "--json").stdout)
    assert facts["backend"] in ("cpu", "reference") and facts["reason"]
    if facts["backend"] == "cpu":
        assert facts["isas"][facts["isa"]] == "runs here" and facts["threads"] >= 1
        assert facts["cpu"] and facts["topology"]["memory nodes"] >= 1
    text = dso("info").stdout
    assert facts["backend"] in text and facts["torch"] in text


def test_without_a_native_build_it_says_why(dso, monkeypatch):
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "no compiler was there")
    facts = json.loads(dso("info", "--json").stdout)
    assert (facts["backend"], facts["reason"]) == ("reference", "no compiler was there")


def test_model(dso, tiny_model):
    result = dso("info", tiny_model, "--precision", "int8", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)["model"]
    assert facts["family"] == "llama" and facts["formats"][0]["format"] == "int8"
    assert "int8" in dso("info", tiny_model, "--precision", "int8").stdout


def test_an_attention_mode(dso, tiny_model):
    result = dso("info", tiny_model, "--attention", "sliding", "--attention-window", "100", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"]["attention"]["window"] == 100
    text = dso("info", tiny_model, "--attention", "sliding", "--attention-window", "100").stdout
    assert "the latest 100 tokens" in text and "the cache drops the rest" in text


def test_an_extended_context(dso, tiny_model):
    result = dso("info", tiny_model, "--context-extension", "yarn", "--context-length", "512", "--json")
    assert result.exit_code == 0, result.output
    assert any("beyond the 256 tokens" in note for note in json.loads(result.stdout)["model"]["warnings"])
