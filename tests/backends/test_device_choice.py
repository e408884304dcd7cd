"""Tokens chosen on the device of the logits are those of the definition; what is too near to another token is left to it."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.reference import device_choice
from deepseek_optimizer.backends.reference.device_choice import UNDECIDED, choose_on_device, drawn_tokens
from deepseek_optimizer.backends.sampling import GREEDY, NOT_FINITE, TokenChoice, choose_token, choose_tokens, filtered

FILTERS = [
    dict(zip(("top_k", "top_p", "min_p"), values, strict=True))
    for values in itertools.product((0, 1, 7, 2000), (1.0, 0.9, 0.3), (0.0, 0.02, 1.0))
]


def rows(count: int, size: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 63, 64, 1500, 5003])
def test_every_filter_has_the_tokens_of_its_definition(size):
    rng = random.Random(size)
    choices = [TokenChoice(temperature, u=rng.random(), **f) for f in FILTERS for temperature in (0.3, 1.0, 2.5)]
    logits = rows(len(choices), size, size)
    tokens = drawn_tokens(logits, choices).tolist()
    exact = choose_tokens(logits.numpy(), choices)
    assert all(token in (UNDECIDED, wanted) for token, wanted in zip(tokens, exact, strict=True))
    assert tokens.count(UNDECIDED) <= 0.1 * len(tokens)
    assert choose_on_device(logits, choices) == exact


@pytest.mark.parametrize("filters", [{}, {"top_k": 40}, {"top_p": 0.95}, {"min_p": 0.05}])
def test_almost_all_tokens_are_decided_there(filters):
    rng = random.Random(1)
    choices = [TokenChoice(0.8, u=rng.random(), **filters) for _ in range(200)]
    logits = rows(len(choices), 4096, 2, spread=6)
    tokens = drawn_tokens(logits, choices).tolist()
    assert tokens.count(UNDECIDED) <= 2
    assert all(
        token in (UNDECIDED, wanted) for token, wanted in zip(tokens, choose_tokens(logits.numpy(), choices), strict=True)
    )


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_k": 50}, {"top_p": 0.8}, {"top_k": 2000, "min_p": 0.1}])
def test_equal_logits(filters):
    """Rounded logits: many are equal, also to the last one that passes; the lower id comes first."""
    rng = random.Random(3)
    choices = [TokenChoice(1.0, u=rng.random(), **filters) for _ in range(40)]
    logits = rows(len(choices), 900, 4).round()
    assert choose_on_device(logits, choices) == choose_tokens(logits.numpy(), choices)


@pytest.mark.parametrize("filters", [{"top_k": 9}, {"top_p": 0.9}, {}])
def test_numbers_at_the_border_of_two_tokens_are_left_to_the_definition(filters):
    logits = rows(1, 300, 5)
    choice = TokenChoice(1.0, **filters)
    _, weights = filtered(logits[0].numpy(), choice)
    if not filters:  # the first columns of the folded vocabulary
        table = np.exp(logits[0].numpy() - logits[0].numpy().max())
        weights = np.concatenate([np.pad(table, (0, 20)).reshape(64, 5).sum(0)])
    borders = np.cumsum(weights, dtype=np.float64)[:4] / weights.sum(dtype=np.float64)
    for border in borders[borders < 1]:
        for u in (border, border - 1e-7, border + 1e-7):
            near = choice._replace(u=float(u))
            assert drawn_tokens(logits, [near]).tolist() == [UNDECIDED]
            assert choose_on_device(logits, [near]) == [choose_token(logits[0].numpy(), near)]
        near = choice._replace(u=float(border) - 1e-4)
        if filters:  # without them, a column has many tokens with borders between them
            assert drawn_tokens(logits, [near]).tolist() == [choose_token(logits[0].numpy(), near)]


def test_a_filter_at_the_border_of_a_token():
    """top_p and min_p that fall onto a token: it may pass in one computation and not in the other."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125]]))
    for filters in ({"top_p": 0.75}, {"min_p": 0.5}):
        choices = [TokenChoice(1.0, u=u, **filters) for u in (0.1, 0.55, 0.8, 0.999)]
        tokens = drawn_tokens(logits.expand(4, 4), choices).tolist()
        assert tokens[0] == 0 and UNDECIDED in tokens[1:]
        assert choose_on_device(logits.expand(4, 4), choices) == choose_tokens(logits.expand(4, 4).numpy(), choices)


def test_rows_of_every_kind_in_one_step(monkeypatch):
    logits = rows(8, 200, 6)
    logits[1, 3], logits[5, 0] = torch.nan, torch.inf
    logits[6, 50:] = -torch.inf
    sampled = TokenChoice(1e-3, top_p=0.9, u=0.4)
    choices = [GREEDY, sampled, None, TokenChoice(1.0, u=0.9), TokenChoice(1e-30, top_k=4, u=0.5), GREEDY, sampled, GREEDY]
    exact = choose_tokens(logits.numpy(), choices)
    assert exact[1] == exact[5] == NOT_FINITE and exact[2] is None
    before = logits.clone()
    assert choose_on_device(logits, choices) == exact
    assert choose_on_device(logits, choices, device_choice.greedy_tokens(logits).tolist()) == exact
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    monkeypatch.setattr(device_choice, "_BYTES", 1)  # a row at a time
    assert choose_on_device(logits, choices) == exact
    assert choose_on_device(logits[:0], []) == []
