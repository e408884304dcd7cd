"""Embeddings on several threads have the bits of one."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.integration.encoder.embed import embed
from deepseek_optimizer.integration.encoder.rows import rows_of, steps_of
from support.encoders import padded, random_encoder, random_sentences


@pytest.mark.parametrize("case", ["roberta", "distilbert", "modernbert"])
def test_threads(case):
    embeddings = random_encoder(case).embeddings
    call = padded(random_sentences(*[600] * 5, 1))
    kept = call["attention_mask"].bool()
    for given in (call, {"inputs_embeds": torch.randn(*kept.shape, 36)}):
        rows = rows_of(embeddings, given, kept)
        one, three = (embed(embeddings, rows, 36, threads) for threads in (1, 3))
        assert one.shape == (3001, 36) and torch.equal(one, three) and not three.requires_grad
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        with torch.no_grad():
            whole = embeddings(input_ids=ids, inputs_embeds=embeds)
        assert torch.equal(one, whole[kept])


@pytest.mark.parametrize("threads", [1, 3])
def test_inference_mode(threads):
    """It holds for the thread that entered it; sentence-transformers calls models in it."""
    embeddings = random_encoder("roberta").embeddings
    call = padded(random_sentences(*[600] * 5, 1))
    rows = rows_of(embeddings, call, call["attention_mask"].bool())
    with torch.inference_mode():
        inside = embed(embeddings, rows, 36, threads)
    assert torch.equal(inside, embed(embeddings, rows, 36, 1))


def test_steps():
    assert list(steps_of([5, 5, 5, 30, 1], 10)) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert list(steps_of([5], 1)) == [(0, 1)] and list(steps_of([], 10)) == []
