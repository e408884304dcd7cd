"""Strings that are not valid Unicode raise an error with the position, before they reach a tokenizer."""

from __future__ import annotations

import pytest

from deepseek_optimizer.chat.conversation import prompt_tokens
from deepseek_optimizer.engine.engine import Engine
from deepseek_optimizer.engine.request import check_text
from deepseek_optimizer.errors import RequestError
from deepseek_optimizer.longdoc.tasks import Question

WRONG = "caf\udce9"  # how Python decodes Latin-1 on a UTF-8 command line


def test_the_error_has_the_position():
    check_text("prompt", "café 世界 😀")
    with pytest.raises(RequestError, match="prompt: has an unpaired surrogate at character 4"):
        check_text("prompt", WRONG)


@pytest.mark.parametrize("raw", [False, True])
def test_messages(byte_tokenizer, raw):
    with pytest.raises(RequestError, match="the user's message: has an unpaired surrogate at character 4"):
        prompt_tokens(byte_tokenizer, [{"role": "user", "content": WRONG}], raw=raw)


def test_prompts_of_an_engine(tiny_model):
    from transformers import AutoTokenizer

    from deepseek_optimizer import load_model, make_engine

    engine = make_engine(load_model(tiny_model, backend="reference"), AutoTokenizer.from_pretrained(tiny_model), drafts=False)
    assert isinstance(engine, Engine)
    with pytest.raises(RequestError, match="prompt: has an unpaired surrogate"):
        engine.generate([WRONG])


def test_questions():
    with pytest.raises(RequestError, match="question: has an unpaired surrogate"):
        Question(WRONG)
