"""Step times, and the decisions based on them: prompt tokens per step, number of sequences, drafts."""

import random

import pytest

from deepseek_optimizer.engine.scheduling.batch_size import BatchSize
from deepseek_optimizer.engine.scheduling.budget import MIN_TOKENS, PromptBudget
from deepseek_optimizer.engine.scheduling.step_times import StepTimes
from deepseek_optimizer.engine.speculative.bandit import DraftBandit


def times(a, b, rows=(1, 4, 16), prompt=None):
    result = StepTimes()
    for n in rows:
        result.add(a + b * n, n, 0)
    if prompt:
        result.add(a + b * rows[0] + prompt * 100, rows[0], 100)
    return result


def test_times_follow_the_linear_model():
    t = times(2.0, 0.5)
    assert t.line() == pytest.approx((2.0, 0.5)) and t.decode(8) == pytest.approx(6.0) and t.decode(40) == pytest.approx(22.0)
    assert StepTimes().decode(3) is None and StepTimes().line() is None
    falling = StepTimes()
    falling.add(3.0, 1, 0)
    falling.add(1.0, 9, 0)
    assert falling.line() == (2.0, 0.0)  # noise: more rows are not faster


def test_outliers_are_ignored():
    t = times(1.0, 0.0, rows=(1,))
    t.add(1000.0, 1, 0)
    assert t.decode(1) < 1.3


def test_an_outlier_that_comes_first_is_forgotten_with_the_second_measurement():
    t = times(30.0, 0.0, rows=(1,))
    t.add(1.0, 1, 0)
    assert t.decode(1) == 1.0
    t.add(2.0, 1, 0)
    assert t.decode(1) == pytest.approx(1.2)  # from then on a moving average


def test_prompt_tokens_are_limited_by_the_stall():
    budget = PromptBudget(512, 3.0, times(2.0, 0.5, prompt=0.1))
    assert budget.tokens(4) == pytest.approx(2 * 4.0 / 0.1, abs=1)
    assert budget.tokens(0) == 512
    assert PromptBudget(512, None, times(2.0, 0.5, prompt=0.1)).tokens(4) == 508
    assert PromptBudget(512, 3.0, times(2.0, 0.5, prompt=50.0)).tokens(4) == MIN_TOKENS
    assert PromptBudget(512, 3.0, StepTimes()).tokens(4) == 64


def test_fixed_chunks_end_at_multiples():
    budget = PromptBudget(512, 3.0, StepTimes(), fixed=64)
    assert budget.part(0, 200, 512) == 64 and budget.part(96, 200, 512) == 32 and budget.part(64, 10, 512) == 10
    assert budget.part(0, 200, 63) == 0
    assert PromptBudget(16, None, StepTimes(), fixed=64).part(0, 99, 16) == 16


@pytest.mark.parametrize("a,b", [(1.0, 0.0), (1.0, 0.01), (1.0, 0.5), (0.1, 1.0)])
def test_the_batch_size_is_near_the_optimum(a, b):
    chosen = BatchSize(1, 32, times(a, b)).choose()
    best = 32 / (a + b * 32)
    assert chosen / (a + b * chosen) >= 0.97 * best
    assert chosen == 1 or (chosen - 1) / (a + b * (chosen - 1)) < 0.97 * best


def test_the_batch_size_respects_range_and_target():
    assert BatchSize(4, 32, times(0.1, 1.0)).choose() >= 4
    assert BatchSize(1, 32, StepTimes()).choose() == 32
    assert BatchSize(1, 32, times(2.0, 0.5), target=6.0).choose() == 8
    assert BatchSize(3, 32, times(2.0, 0.5), target=1.0).choose() == 3
    assert BatchSize(1, 8, times(2.0, 0.0), target=5.0).choose() == 8
    assert BatchSize(2, 8, times(2.0, 0.0), target=1.0).choose() == 2


def test_outliers_do_not_shrink_the_batch_permanently():
    """Slow measurements of a size expire, and then the size is tried again."""
    t = StepTimes()
    batch = BatchSize(1, 16, t)
    for _ in range(5):
        t.add(0.001, 1, 0)
        t.add(0.0016, 16, 0)
    for n in (14, 15, 16):
        t.add(0.04, n, 0)
    chosen = [batch.choose()]
    for _ in range(2_000):
        n = chosen[-1]
        t.add(0.001, n, 0)
        chosen.append(batch.choose())
    assert min(chosen) == 1 and min(chosen[1_000:]) == 16


def simulate(acceptance, draft_cost, steps=3_000, max_drafts=6, sequences=1, seed=0):
    """Tokens per duration of a plain step; 1 is plain decoding."""
    rng, t, bandit = random.Random(seed), StepTimes(), DraftBandit(max_drafts)
    tokens = seconds = 0.0
    for _ in range(steps):
        n = bandit.choose(max_drafts, sequences, sequences, t)
        took = 1.0 + draft_cost * n
        held = 0
        while held < n and rng.random() < acceptance:
            held += 1
        t.add(took, sequences + n, 0)
        plain = t.decode(sequences) or 1.0
        bandit.record(n, held, max((t.decode(sequences + n) or plain) - plain, 0.0), plain / sequences)
        tokens, seconds = tokens + 1 + held, seconds + took
    return tokens / seconds


@pytest.mark.parametrize("draft_cost", [0.05, 0.3, 1.0])
def test_rejected_drafts_cost_almost_nothing(draft_cost):
    assert simulate(0.0, draft_cost) >= 0.97


@pytest.mark.parametrize("acceptance,draft_cost,least", [(0.9, 0.05, 3.0), (0.8, 0.1, 2.2), (0.5, 0.05, 1.5)])
def test_accepted_drafts_are_faster(acceptance, draft_cost, least):
    assert simulate(acceptance, draft_cost) >= least


def test_unprofitable_drafts_are_stopped():
    assert simulate(0.5, 1.0) >= 0.97


def test_the_bandit_notices_a_change():
    rng, t, bandit = random.Random(1), StepTimes(), DraftBandit(4)
    tokens, half = 0, []
    for step in range(4_000):
        n = bandit.choose(4, 1, 1, t)
        acceptance = 0.0 if step < 2_000 else 0.95
        held = 0
        while held < n and rng.random() < acceptance:
            held += 1
        t.add(1.0 + 0.1 * n, 1 + n, 0)
        bandit.record(n, held, 0.1 * n, 1.0)
        tokens += 1 + held
        half.append(held)
    assert sum(half[:2_000]) == 0 and sum(half[2_200:]) > 3 * 1_500
