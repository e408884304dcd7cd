"""Changes of logits, and log probabilities, where the logits are: those of the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.device_logits import changed_logits, log_probabilities
from deepseek_optimizer.backends.sampling import Change, apply_changes, largest_tokens, log_probability


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int64)


def numbers(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


CHANGES = [
    (Change(ids(0, 3, 7), 1.3), Change(ids(3, 9), added=numbers(-0.7, 2.5))),
    (Change(ids(1, 2), added=numbers(-np.inf, 0.1)), Change(ids(2, 5), added=numbers(0.3, -np.inf)), Change(ids(5), 0.5)),
    (),
    (Change(ids()), Change(ids(4, 4), added=numbers(-np.inf, -np.inf)), Change(ids(6), 1e-25, numbers(1.0))),
]


def test_the_same_bits_as_the_definition():
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0))
    before, rows = logits.clone(), [4, 0, 5, 1]
    made = changed_logits(logits, rows, CHANGES)
    for own, row, changes in zip(made.numpy(), rows, CHANGES, strict=True):
        exact = logits[row].numpy().copy()
        apply_changes(exact, changes)
        assert np.array_equal(own, exact)
    assert torch.equal(logits, before)


def test_bad_logits_stay_bad():
    """Also those of barred tokens, so that the row is never taken for a good one."""
    logits = torch.zeros(2, 5)
    logits[0, 1], logits[1, 2] = torch.nan, torch.inf
    made = changed_logits(logits, [0, 1], [(Change(ids(1, 2), added=numbers(-np.inf, -np.inf)),)] * 2)
    assert made[0].isnan().any() and not made[1].max().isfinite()


@pytest.mark.parametrize("most", [0, 4])
def test_log_probabilities(most):
    logits = 4 * torch.randn(5, 200, generator=torch.Generator().manual_seed(1))
    logits[3] = logits[3].round()
    wanted = [(3, 7, most), (0, 199, 0), (1, 0, most // 2)]
    for (logprob, top), (row, token, count) in zip(log_probabilities(logits, wanted), wanted, strict=True):
        own = logits[row].numpy()
        tokens = largest_tokens(own, count) if count else ids()
        assert [t for t, _ in top] == tokens.tolist()
        exact = log_probability(own, np.concatenate([ids(token), tokens]))
        assert [logprob, *(value for _, value in top)] == pytest.approx(exact.tolist(), abs=1e-6)
