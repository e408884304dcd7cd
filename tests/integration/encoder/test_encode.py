"""`model.dso.encode`: texts without padding."""

from __future__ import annotations

import copy

import pytest
import torch

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer, UnsupportedRequestError
from deepseek_optimizer.backends.cpu import unavailable_reason
from support.encoders import CASES, random_encoder, random_sentences
from support.models import assert_close_rows


def optimized(model, **settings):
    settings = {"precision": "fp32", **settings}
    return DynamicGraphOptimizer(copy.deepcopy(model), config=DeepSeekConfig(**settings)).optimize()


@pytest.mark.parametrize("case", CASES)
def test_equals_one_by_one(case):
    plain = random_encoder(case)
    fast = optimized(plain, prefill_chunk=50)
    texts = random_sentences(30, 1, 100, 19, 20, 21, 2)
    made = fast.dso.encode(texts)
    for text, states in zip(texts, made, strict=True):
        with torch.no_grad():
            assert_close_rows(states, plain(torch.tensor([text]))[0][0])
            one = fast(torch.tensor([text]))[0][0]
        if unavailable_reason() is None:
            assert torch.equal(states, one) and torch.equal(states, fast.dso.encode([text])[0])


@pytest.mark.skipif(unavailable_reason() is not None, reason="torch's products depend on the batch")
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("case", ["bert", "modernbert"])
def test_other_texts_do_not_change_bits(case, precision):
    fast = optimized(random_encoder(case), precision=precision)
    texts = random_sentences(30, 1, 100, 19, 20, 21, 2, 300)
    for text, states in zip(texts, fast.dso.encode(texts), strict=True):
        assert torch.equal(states, fast.dso.encode([text])[0])


def test_token_types_and_heads():
    plain = random_encoder("bert", "ForSequenceClassification")
    fast, (text,) = optimized(plain), random_sentences(12)
    types = [0] * 5 + [1] * 7
    (states,) = fast.dso.encode([text], [types])
    with torch.no_grad():
        expected = plain(torch.tensor([text]), token_type_ids=torch.tensor([types])).logits
        made = fast.classifier(fast.bert.pooler(states[None]))
    assert_close_rows(made, expected)


def test_refused():
    fast = optimized(random_encoder("bert"))
    assert fast.dso.encode([]) == []
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        fast.dso.encode([[5], []])
    with pytest.raises(ValueError, match="token_type_ids must have as many"):
        fast.dso.encode([[5, 6]], [[0]])
    with pytest.raises(ValueError, match="input_ids has 1000"):
        fast.dso.encode([[5, 1000]])
    with pytest.raises(ValueError, match="position_ids has 700"):
        fast.dso.encode([[5] * 701])
    fast.train()
    with pytest.raises(UnsupportedRequestError, match="training mode; call the model with padded batches"):
        fast.dso.encode([[5]])
