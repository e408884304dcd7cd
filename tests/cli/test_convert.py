"""`dso convert`: the packed copy is complete or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from deepseek_optimizer import load_model
from deepseek_optimizer.checkpoint import atomic_directory
from deepseek_optimizer.integration.load import calibrate


def test_convert_then_run(dso, tiny_model, tmp_path):
    out = tmp_path / "packed"
    result = dso("convert", tiny_model, out, "--precision", "int8", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["bytes"] == sum(f.stat().st_size for f in out.iterdir()) and [p.name for p in tmp_path.iterdir()] == ["packed"]
    direct = dso("run", tiny_model, "Hello", "-t", "0", "-n", "12", "-p", "int8")
    assert dso("run", out, "Hello", "-t", "0", "-n", "12").stdout == direct.stdout != ""


def test_convert_to_a_budget(dso, tiny_model, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    arguments = ("convert", tiny_model, tmp_path / "packed", "--kl-budget", "0.001", "--calibration", tmp_path / "text.txt")
    result = dso(*arguments, "--json")
    assert result.exit_code == 0, result.output
    curve = json.loads(result.stdout)["curve"]
    (chosen,) = (point for point in curve if point["chosen"])
    assert chosen["measured_kl"] <= 0.001 and len(curve) > 1
    shown = dso(*arguments, "--force").stdout.splitlines()
    assert len(shown) == 1 + len(curve) and sum(line.endswith("(chosen)") for line in shown) == 1
    result = dso("convert", tiny_model, tmp_path / "other", "--kl-budget", "0.001", "--precision", "int4")
    assert result.exit_code == 2 and "kl_budget chooses the formats itself" in result.stderr


def test_convert_calibrates_by_default_and_a_load_does_not(dso, tiny_model, tmp_path, monkeypatch):
    monkeypatch.delenv("DSO_CALIBRATION")
    monkeypatch.setattr(calibrate, "COUNT", 1)
    for name, more in (("packed", ()), ("plain", ("--calibration", "none"))):
        assert dso("convert", tiny_model, tmp_path / name, "-p", "int4", *more).exit_code == 0
    manifests = [json.loads((tmp_path / name / "config.json").read_text())["packed_manifest"] for name in ("packed", "plain")]
    assert manifests[0]["rounding"]["text"] == calibrate.BUILT_IN and not manifests[1].get("rounding")
    assert load_model(tiny_model, precision="int4").dso.manifest.rounding == {}


def test_convert_with_a_calibration_text(dso, tiny_model, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    for name, more in (("plain", ()), ("weighed", ("--calibration", tmp_path / "text.txt"))):
        result = dso("convert", tiny_model, tmp_path / name, "--precision", "q4_1", *more)
        assert result.exit_code == 0, result.output
    plain, weighed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "weighed"))
    assert len(plain) == len(weighed) and plain != weighed
    (tmp_path / "text.txt").write_bytes(b"\xff")
    result = dso("convert", tiny_model, tmp_path / "other", "-p", "int4", "--calibration", tmp_path / "text.txt")
    assert result.exit_code == 2 and "is not UTF-8" in result.stderr and not (tmp_path / "other").exists()


def test_an_existing_directory_is_kept_unless_forced(dso, tiny_model, tmp_path):
    out = tmp_path / "packed"
    out.mkdir()
    (out / "precious").write_text("mine")
    result = dso("convert", tiny_model, out)
    assert result.exit_code == 2 and "--force" in result.stderr and (out / "precious").exists()
    assert dso("convert", tiny_model, out, "--force").exit_code == 0
    assert (out / "config.json").exists() and not (out / "precious").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_convert_is_resumed(dso, tiny_model, tmp_path, monkeypatch, error):
    def fails(self, folder, **options):  # called after the model was written and before the tokenizer is
        assert any(Path(folder).iterdir())
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", fails)
        result = dso("convert", tiny_model, tmp_path / "packed")
        assert result.exit_code == (130 if error is KeyboardInterrupt else 2)
        assert "run the same command again to resume" in result.stderr and not (tmp_path / "packed").exists()
    result = dso("convert", tiny_model, tmp_path / "packed")
    assert result.exit_code == 0 and "1 of 1 files are finished" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]
    assert dso("convert", tiny_model, tmp_path / "other").stderr == ""
    assert (tmp_path / "packed/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_convert_to_a_budget_leaves_nothing(dso, tiny_model, tmp_path, monkeypatch, error):
    def fails(self, folder, **options):
        raise error

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fails)
    result = dso("convert", tiny_model, tmp_path / "packed", "--kl-budget", "1")
    assert result.exit_code == (130 if error is KeyboardInterrupt else 2)
    assert not list(tmp_path.iterdir())


def test_leftovers_are_removed_and_concurrent_runs_are_reported(dso, tiny_model, tmp_path):
    (tmp_path / ".packed.0123abcd.tmp").mkdir()
    assert dso("convert", tiny_model, tmp_path / "packed").exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]
    with atomic_directory(tmp_path / "packed", overwrite=True) as other:
        result = dso("convert", tiny_model, tmp_path / "packed", "--force")
        assert result.exit_code == 0 and f"{other} belongs to another run" in result.stderr and other.is_dir()


def test_a_model_is_not_packed_over_itself(dso, tiny_model):
    before = sorted(p.name for p in tiny_model.iterdir())
    result = dso("convert", tiny_model, tiny_model, "--precision", "int4", "--force")
    assert result.exit_code == 2 and "the model itself" in result.stderr
    assert sorted(p.name for p in tiny_model.iterdir()) == before
