"""Drafts from a draft vocabulary, and tokens after chosen ones, with and without logits processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepseek_optimizer.engine.draft import DraftVocabulary
from deepseek_optimizer.engine.sampling.torch_sampler import TorchSampler

V = 40
TOKENS = np.array([1, 4, 9, 16, 25, 36])


def prefer(index, drafted, logits):
    """Depends on the sequence and on what was drafted; never changes the order of the logits' columns."""
    return logits + torch.arange(V) * (0.1 * index + len(drafted))


@pytest.mark.parametrize("process", [None, prefer], ids=["unprocessed", "processed"])
def test_drafts_are_the_likeliest_of_the_vocabulary(process):
    sampler, vocabulary = TorchSampler(sampled=False, process=process), DraftVocabulary(TOKENS, V)
    for seed in range(20):
        logits = torch.randn(len(TOKENS), generator=torch.Generator().manual_seed(seed))
        whole = torch.full((V,), -torch.inf)
        whole[TOKENS] = logits
        assert torch.equal(vocabulary.whole(logits), whole)
        wanted = whole if process is None else process(2, [5], whole[None])[0]
        assert sampler.draft(2, [5], logits, vocabulary) == (int(wanted.argmax()), None)


@pytest.mark.parametrize("process", [None, prefer], ids=["unprocessed", "processed"])
def test_drafts_are_drawn_from_their_distribution(process):
    sampler, vocabulary = TorchSampler(sampled=True, process=process), DraftVocabulary(TOKENS, V)
    torch.manual_seed(0)
    logits = torch.randn(len(TOKENS)) + 0.3
    whole = torch.full((V,), -torch.inf)
    whole[TOKENS] = logits
    expected = (whole if process is None else process(0, [], whole[None])[0]).softmax(-1)
    counts = torch.zeros(V)
    for _ in range(3000):
        token, q = sampler.draft(0, [], logits, vocabulary)
        counts[token] += 1
    torch.testing.assert_close(torch.from_numpy(q), expected)
    assert (q[np.setdiff1d(np.arange(V), TOKENS)] == 0).all()
    assert (counts / 3000 - expected).abs().max() < 0.04


def test_a_vocabulary_that_the_processors_exclude():
    """The draft is one that the model cannot accept, and its distribution says so."""
    sampler = TorchSampler(sampled=True, process=lambda index, drafted, logits: torch.full_like(logits, -torch.inf))
    token, q = sampler.draft(0, [], torch.randn(len(TOKENS)), DraftVocabulary(TOKENS, V))
    assert token == TOKENS[0] and q[token] == 1 and q.sum() == 1


@pytest.mark.parametrize("tokens", [[], [-1, 3], [3, 3], [4, 3], [3, V]], ids=str)
def test_bad_vocabularies(tokens):
    with pytest.raises(ValueError, match=f"must be ascending token ids below {V}"):
        DraftVocabulary(np.array(tokens, np.int64), V)


def test_the_token_after_chosen_ones():
    logits = torch.randn(V)
    assert TorchSampler(sampled=False).choose(0, [3], logits) == int(logits.argmax())
    assert TorchSampler(sampled=False, process=prefer).choose(1, [3, 4], logits) == int(prefer(1, [3, 4], logits).argmax())
    peaked = torch.where(torch.arange(V) == 7, 50.0, 0.0)
    assert TorchSampler(sampled=True).choose(0, [], peaked) == 7
