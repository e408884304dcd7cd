"""`dso convert`: the packed copy is complete or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerBase

from deepseek_optimizer import load_model
from deepseek_optimizer.checkpoint import atomic_directory
from deepseek_optimizer.integration.load import calibrate
from support.byte_tokenizer import new_byte_tokenizer
from support.multimodal import FAMILIES, make_model, make_prompts
from support.picture_processors import picture, save_pair


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


@torch.no_grad()
def logits_of(model, arguments):
    return model(**arguments).logits


@pytest.fixture(params=["qwen3_5", "gemma4", "qwen2_5_vl"])
def seeing(request, tmp_path):
    """A model that reads pictures, with a tokenizer, and its family."""
    make_model(FAMILIES[request.param], vocab_size=270).save_pretrained(tmp_path / "seeing")
    new_byte_tokenizer().save_pretrained(tmp_path / "seeing")
    return tmp_path / "seeing", FAMILIES[request.param]


def test_models_that_see_are_converted_as_a_whole(dso, seeing, tmp_path):
    folder, family = seeing
    for more in ((), ("--calibration", "none")):
        result = dso("convert", folder, tmp_path / "packed", "-p", "int8", "--force", *more)
        assert result.exit_code == 0, result.output
        arguments = make_prompts(family, [1, 2]).arguments
        expected = logits_of(load_model(folder, precision="int8"), arguments)
        for loaded in (load_model(tmp_path / "packed"), AutoModelForImageTextToText.from_pretrained(tmp_path / "packed")):
            assert loaded.report().path == "multimodal"
            assert torch.equal(logits_of(loaded, arguments), expected)


def test_conversion_of_the_language_model(dso, seeing, tmp_path):
    """Of what can be loaded alone; also from a packed copy of the whole, which can be loaded without its tower, too."""
    folder, family = seeing
    if family is FAMILIES["qwen2_5_vl"]:
        result = dso("convert", folder, tmp_path / "language", "--vision", "off")
        assert result.exit_code == 2 and "cannot be loaded alone" in result.stderr
        return
    assert dso("convert", folder, tmp_path / "whole", "-p", "int8").exit_code == 0
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    expected = logits_of(load_model(folder, precision="int8", vision="off"), {"input_ids": ids})
    for name in ("seeing", "whole"):
        result = dso("convert", tmp_path / name, tmp_path / "language", "-p", "int8", "--vision", "off", "--force")
        assert result.exit_code == 0, result.output
        for loaded in (load_model(tmp_path / "language"), load_model(tmp_path / "whole", vision="off")):
            assert type(loaded).__name__.endswith("ForCausalLM")
            assert torch.equal(logits_of(loaded, {"input_ids": ids}), expected)


def test_a_calibrated_conversion_leaves_the_tower_out(dso, seeing, tmp_path):
    folder, family = seeing
    if family is FAMILIES["qwen2_5_vl"]:
        return
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    result = dso("convert", folder, tmp_path / "packed", "-p", "q4_1", "--calibration", tmp_path / "text.txt")
    assert result.exit_code == 0 and "this model does not read pictures" in result.stderr
    assert type(load_model(tmp_path / "packed")).__name__.endswith("ForCausalLM")


def test_a_converted_model_has_its_processor(dso, tmp_path):
    save_pair(tmp_path / "seeing")
    picture(33, 21).save(tmp_path / "a.png")
    assert dso("convert", tmp_path / "seeing", tmp_path / "packed", "-p", "int8").exit_code == 0
    question = ("what", "--image", tmp_path / "a.png", "-t", "0", "-n", "8")
    direct = dso("run", tmp_path / "seeing", *question, "-p", "int8")
    result = dso("run", tmp_path / "packed", *question)
    assert result.exit_code == 0 and result.stdout == direct.stdout != ""
