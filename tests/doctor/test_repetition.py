"""Repetitive text: measured on models that repeat themselves, and on one that does not."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.doctor.symptoms import repetition


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([], 0),
        ([1, 2, 3, 4], 0),
        (range(20), 0),
        ([7] * 20, 16 / 17),
        ([1, 2, 3] * 5, 9 / 12),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1 / 6),
    ],
)
def test_share_of_repeated_text(ids, share):
    assert repetition.repeated_share(list(ids)) == pytest.approx(share)


def test_greedy_repeats_and_sampling_does_not(case, tiny_model, one):
    """Random weights for which the current token is the most likely next one, with a small margin."""
    finding = one(repetition.measure(case(model=str(tiny_model))), "warning", "greedy answers repeat themselves")
    assert finding.facts["repeated_greedy"] > repetition.LIMIT >= finding.facts["repeated_sampled"]
    assert "temperature=0.7" in finding.fix and "top_k=50" in finding.fix


def test_the_models_sampling_parameters_are_tried(case, model_copy, one):
    model_copy.edit("generation_config.json", do_sample=True, temperature=1.5, top_k=20)
    finding = one(repetition.measure(case(model=str(model_copy.path))), "warning", "greedy answers repeat themselves")
    assert (finding.facts["temperature"], finding.facts["top_k"]) == (1.5, 20)


def test_sampling_near_zero_repeats_too(case, model_copy, one):
    model_copy.edit("generation_config.json", do_sample=True, temperature=0.001, top_k=50)
    finding = one(repetition.measure(case(model=str(model_copy.path))), "warning", "sampled answers repeat themselves too")
    assert finding.facts["repeated_penalised"] is not None and "garbage" in finding.fix


def test_a_penalty_below_one(case, model_copy, one):
    model_copy.edit("generation_config.json", repetition_penalty=0.5)
    one(repetition.measure(case(model=str(model_copy.path))), "warning", "repetition_penalty=0.5")


def test_no_repetition(case, model_copy, one):
    """Embedding and head in a ring: token i is followed by token i + 1."""

    def ring(weights):
        size, width = weights["model.embed_tokens.weight"].shape
        table = torch.randn(size, width, generator=torch.Generator().manual_seed(1))
        for name, value in weights.items():
            if "proj" in name:
                value.zero_()
        weights["model.embed_tokens.weight"] = table
        weights["lm_head.weight"] = table.roll(1, 0)

    model_copy.edit("config.json", tie_word_embeddings=False)
    model_copy.edit_weights(ring)
    finding = one(repetition.measure(case(model=str(model_copy.path))), "ok", "neither answer repeats itself")
    assert finding.facts["repeated_greedy"] == 0
