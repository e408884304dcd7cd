"""`dso prune`: a smaller checkpoint that everything else loads, and its recovery."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek_optimizer import load_model
from support.quantized_files import SECTIONS, gptq, quantized_copy
from support.saved_llama import saved_llama


@pytest.fixture(autouse=True)
def short_comparison(monkeypatch):
    monkeypatch.setattr("deepseek_optimizer.prune.report.ROUNDS", 1)


@pytest.fixture
def pruned(dso, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda *flags, model=tiny_model: dso("prune", model, tmp_path / "out", *flags)


def test_a_smaller_model_is_written(pruned, dso, tmp_path):
    result = pruned("--depth", "0.5", "--mlp", "0.25", "--heads", "0.5", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    original, row = facts["rows"]
    assert (original["name"], original["kl"], original["speed"]) == ("original", 0, 1)
    assert row["name"] == "pruned" and row["layers"] == 1 and row["kl"] > 0 and row["loss"] > 0 and row["speed"] > 0
    assert row["parameters"] < original["parameters"] and row["bytes"] < original["bytes"]
    assert facts["kept"] == {"mlp": 96, "heads": 1} and facts["left_out"][0][1] > 0
    out = tmp_path / "out"
    plain, ids = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), AutoTokenizer.from_pretrained(out)("count")
    tokens = torch.tensor([ids["input_ids"]])
    expected = plain(tokens).logits
    assert (load_model(out)(tokens).logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert dso("convert", out, tmp_path / "packed", "--precision", "int8").exit_code == 0


def test_the_result_is_shown_as_a_table(pruned):
    lines = pruned("--depth", "0.5").stdout.splitlines()
    assert lines[0].startswith("layers left out, in this order: ")
    assert [line.split()[0] for line in lines[1:4]] == ["layers", "original", "pruned"]


def test_recovery_brings_the_pruned_model_closer(pruned, dso, tmp_path, monkeypatch):
    monkeypatch.setattr("deepseek_optimizer.system.progress.FIRST_LINE_S", 0.05)  # however fast the machine is
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"number {i} " * 12}) + "\n" for i in range(60)))
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("number 7 and number 9 " * 60)
    settings = ("--data", texts, "--steps", "30", "--lr", "3e-3", "--max-length", "128")
    result = pruned("--depth", "0.5", "--text", held_out, *settings, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    _, before, after = facts["rows"]
    assert after["name"] == "recovered" and after["kl"] < 0.7 * before["kl"]
    assert after["parameters"] == before["parameters"] and facts["seconds"] > 0
    for name in ("out", "out-pruned"):
        assert json.loads((tmp_path / name / "config.json").read_text())["num_hidden_layers"] == 1
    assert f"continue with: dso train {tmp_path / 'out' / 'train.json'} --resume" in result.stderr
    assert "steps    30 of " in result.stderr and "Training: done in" in result.stderr  # the plan, and the progress
    again = dso("train", tmp_path / "out" / "train.json", "--resume", "--dry-run", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["model"] == str(tmp_path / "out-pruned")


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "nothing to prune; give the fraction of layers"),
        (("--depth", "1.5"), "depth: must be a fraction above 0 and below 1"),
        (("--mlp", "0.01"), "mlp: 0.01 of 128 leaves out none, since they are left out in steps of 32"),
        (("--experts", "0.5"), "experts: cannot be pruned in models of type llama"),
        (("--depth", "0.5", "--steps", "3"), "--steps, --learning-rate, --max-length and --set train the pruned model"),
        (("--depth", "0.5", "--data", "x.jsonl", "--set", "nothing=1"), "arguments has no field 'nothing'"),
        (("--depth", "0.5", "--calibration", "/nowhere.txt"), "/nowhere.txt cannot be read"),
    ],
)
def test_invalid_settings_are_refused_before_anything_is_written(pruned, tmp_path, flags, message):
    result = pruned(*flags)
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_kept(pruned, tmp_path):
    (tmp_path / "out").mkdir()
    result = pruned("--depth", "0.5")
    assert result.exit_code == 2 and "exists already" in result.stderr
    assert pruned("--depth", "0.5", "--force").exit_code == 0


def test_quantized_models_are_refused(pruned, tiny_model, tmp_path):
    folder, _ = quantized_copy(tiny_model, tmp_path / "gptq", gptq, SECTIONS["gptq"])
    result = pruned("--depth", "0.5", model=folder)
    assert result.exit_code == 2 and "are quantized; prune the original model" in result.stderr


def test_a_number_of_heads_that_transformers_refuses(pruned, byte_tokenizer, tmp_path):
    model = saved_llama(tmp_path / "eight", byte_tokenizer, num_attention_heads=8, num_key_value_heads=8)
    result = pruned("--heads", "0.25", model=model)
    assert result.exit_code == 2 and "Transformers refuses the config of the pruned model" in result.stderr
