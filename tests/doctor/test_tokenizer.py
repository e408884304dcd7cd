"""Faults of tokenizers."""

from __future__ import annotations

import json

import pytest

from deepseek_optimizer.doctor.checks import tokenizer


def test_good(case, tiny_model, one):
    assert one(tokenizer.check(case(model=str(tiny_model))), "ok", "a chat template").facts["chat_template"]


def test_missing(case, model_copy, one):
    for file in model_copy.path.glob("*token*"):
        file.unlink()
    one(tokenizer.check(case(model=str(model_copy.path))), "error", "no tokenizer that matches")


@pytest.fixture
def without_template(model_copy):
    (model_copy.path / "chat_template.jinja").unlink(missing_ok=True)
    model_copy.edit("tokenizer_config.json", chat_template=None)
    return model_copy


def test_no_chat_template(case, without_template, one):
    one(tokenizer.check(case(model=str(without_template.path))), "warning", "no chat template")


def test_a_template_that_fails(case, without_template, one):
    (without_template.path / "chat_template.jinja").write_text("{{ raise_exception('no user may speak') }}")
    assert "no user may speak" in one(tokenizer.check(case(model=str(without_template.path))), "error", "template fails").cause


def test_no_end_token(case, model_copy, one):
    model_copy.edit("generation_config.json", eos_token_id=None)
    one(tokenizer.check(case(model=str(model_copy.path))), "warning", "no end-of-sequence token")


def test_another_end_token(case, model_copy, one):
    model_copy.edit("generation_config.json", eos_token_id=[3, 5])
    assert "3, 5, " in one(tokenizer.check(case(model=str(model_copy.path))), "warning", "where generation does not stop").fix


def test_text_is_lost(case, model_copy, one):
    """The vocabulary lacks bytes, like a truncated one."""
    content = json.loads((model_copy.path / "tokenizer.json").read_text())
    for letter in "aeiou":
        content["model"]["vocab"].pop(letter)
    (model_copy.path / "tokenizer.json").write_text(json.dumps(content))
    one(tokenizer.check(case(model=str(model_copy.path))), "warning", "loses text")
