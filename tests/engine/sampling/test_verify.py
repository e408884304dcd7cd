"""Exact verification: greedy against plain greedy decoding, sampling by chi-square against the target distribution."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_optimizer.engine.sampling.verify import accept_greedy, accept_sampled

V, ROUNDS = 6, 20_000


def test_greedy_accepts_drafts_up_to_the_first_mismatch():
    requested = []

    def largest(j):
        requested.append(j)
        return [5, 7, 9, 4][j]

    assert accept_greedy([5, 7, 1], largest) == [5, 7, 9]
    assert requested == [0, 1, 2]
    assert accept_greedy([5, 7, 9], largest) == [5, 7, 9, 4]
    assert accept_greedy([1, 7, 9], largest) == [5]
    assert accept_greedy([], largest) == [5]


def target(seed):
    """A model's distributions over V tokens by the preceding tokens, float64 [V] each; some tokens are impossible."""
    made = {}

    def of(prefix):
        if prefix not in made:
            rng = np.random.default_rng([seed, *prefix])
            p = rng.dirichlet(np.full(V, 0.7))
            p[rng.integers(V)] = 0
            made[prefix] = p / p.sum()
        return made[prefix]

    return of


def chi_square(counts, p):
    """Chi-square over the cells with an expected count of at least 5; impossible cells must be empty."""
    expected = p * counts.sum()
    assert (counts[p == 0] == 0).all()
    cells = expected >= 5
    return (((counts - expected) ** 2)[cells] / expected[cells]).sum(), int(cells.sum()) - 1


QUANTILE = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5}  # chi-square, 0.999


@pytest.mark.parametrize("kind", ["drawn from another distribution", "drawn from the model's own", "for certain"])
@pytest.mark.parametrize("seed", [0, 1])
def test_sampling_preserves_the_distribution(kind, seed):
    """For the first token, and the second given the first, with drafts from a bad q, from q = p, and from argmax."""
    rng = np.random.default_rng(seed)
    p, bad = target(seed), target(seed + 100)
    first, second = np.zeros(V), np.zeros((V, V))
    lengths = []

    def draw(weights):
        return int(rng.choice(V, p=weights / weights.sum()))

    for _ in range(ROUNDS):
        drafts, q = [], []
        for _ in range(2):
            prefix = tuple(drafts)
            q.append(p(prefix) if kind.endswith("own") else bad(prefix))
            drafts.append(int(q[-1].argmax()) if kind == "for certain" else draw(q[-1]))
        known = [p(tuple(drafts[:j])) for j in range(3)]
        tokens = accept_sampled(drafts, None if kind == "for certain" else q, known.__getitem__, rng.random, draw)
        lengths.append(len(tokens))
        tokens = [*tokens, draw(p(tuple(tokens)))][:2]
        first[tokens[0]] += 1
        second[tokens[0], tokens[1]] += 1
    actual, freedom = chi_square(first, p(()))
    assert actual < QUANTILE[freedom]
    for token in np.flatnonzero(first > 200):
        actual, freedom = chi_square(second[token], p((int(token),)))
        assert actual < QUANTILE[freedom]
    if kind.endswith("own"):
        assert set(lengths) == {3}  # all are accepted
    else:
        # a draft is accepted with probability sum of min(p, q) (Leviathan et al., theorem 3.5); argmax has a one-point q
        q = np.eye(V)[bad(()).argmax()] if kind == "for certain" else bad(())
        assert np.mean(np.array(lengths) > 1) == pytest.approx(np.minimum(p(()), q).sum(), abs=0.015)


def test_a_wrong_rule_is_detected():
    """The statistic detects rejected positions that are sampled from p instead of the rest."""
    rng, p, q = np.random.default_rng(0), target(0)(()), target(100)(())
    counts = np.zeros(V)
    for _ in range(ROUNDS):
        x = int(rng.choice(V, p=q))
        counts[x if rng.random() * q[x] < p[x] else int(rng.choice(V, p=p))] += 1
    actual, freedom = chi_square(counts, p)
    assert actual > 10 * QUANTILE[freedom]


def test_nothing_left_after_rounding():
    """p equals q, but the draft was rejected: the token is sampled from p."""
    p = np.array([0.5, 0.5], np.float32)
    weights = []
    tokens = accept_sampled([0], [p], lambda j: p, lambda: 1.0, lambda w: weights.append(w) or 1)
    assert tokens == [1]
    assert np.array_equal(weights[0], p)
