"""The commands with a model that has no execution plan."""

from __future__ import annotations

import json
import shutil

import pytest

from deepseek_optimizer.integration.general.modules import GeneralLinear


@pytest.fixture
def gpt2(tiny_model, tmp_path):
    """A small GPT-2 with the tiny model's tokenizer."""
    from support.general_models import random_general

    folder = tmp_path / "gpt2"
    vocabulary = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    random_general("gpt2", vocab_size=vocabulary).save_pretrained(folder)
    for file in tiny_model.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def test_info(dso, gpt2):
    result = dso("info", gpt2, "--precision", "int8", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)["model"]
    assert facts["path"] == "general" and facts["layers"] == 8 and facts["formats"][0]["format"] == "int8"
    assert "general path" in dso("info", gpt2).stdout


def test_strict(dso, gpt2):
    result = dso("info", gpt2, "--strict")
    assert result.exit_code == 2 and "'gpt2' is not supported" in result.stderr and len(result.stderr.splitlines()) == 1


def test_convert(dso, gpt2, tmp_path):
    from deepseek_optimizer import load_model

    out = tmp_path / "packed"
    result = dso("convert", gpt2, out, "--precision", "int4")
    assert result.exit_code == 0, result.output
    formats = {module.format for module in load_model(out).modules() if isinstance(module, GeneralLinear)}
    assert formats == {"int4"} and (out / "tokenizer.json").exists()


def test_commands_that_need_a_plan_end_in_one_line(dso, gpt2):
    result = dso("run", gpt2, "hello")
    assert result.exit_code == 2 and "no execution plan" in result.stderr and "model.generate" in result.stderr
