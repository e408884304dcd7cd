"""The learned policy: that it finds the best arm, what its guard allows, and that it does not change texts."""

from __future__ import annotations

import random

import pytest

from deepseek_optimizer import ConfigError
from deepseek_optimizer.engine.options import EngineOptions
from deepseek_optimizer.engine.request import Request, SamplingParams
from deepseek_optimizer.engine.scheduling.arm_values import ArmValues
from deepseek_optimizer.engine.scheduling.credit import Credit
from deepseek_optimizer.engine.scheduling.learned_policy import LearnedPolicy, arms_around
from deepseek_optimizer.engine.scheduling.policies import policy_of
from deepseek_optimizer.engine.scheduling.policy import FixedPolicy, Load, Progress, StepLimits, limits_of
from deepseek_optimizer.engine.scheduling.step_times import StepTimes
from support.engine_runs import run
from support.mock_model import VOCAB, expected, make_core
from support.scripted_proposer import ScriptedProposer

OWN = StepLimits(32, 512, 2.5)


def times() -> StepTimes:
    found = StepTimes()
    found.add(0.01, 1, 0)
    found.add(0.03, 0, 20)
    return found


def play(policy: LearnedPolicy, periods: int, seconds_of) -> float:
    """Serves one request at a time, which takes `seconds_of(limits, period)` per step; returns the seconds of all steps."""
    total = 0.0
    for period in range(periods):
        for step in range(16):
            limits = policy.limits(Load(0, int(step > 0), 100.0, 0.0))
            seconds = seconds_of(limits, period)
            policy.stepped(seconds, [Progress(0, 1, 0, 16 - step, 16 if step == 15 else None)])
            total += seconds
    return total


def test_thompson_sampling_finds_the_best_arm_and_follows_a_change():
    rng, values = random.Random(0), ArmValues(4, 0.98)
    for best in (2, 3):
        chosen = []
        for _ in range(600):
            arm = values.sample(rng)
            values.add(arm, (1.2 if arm == best else 1.0) * rng.uniform(0.7, 1.3), 1.0)
            chosen.append(arm)
        assert chosen[-200:].count(best) > 140


def test_an_arm_is_judged_by_the_ratio_of_sums():
    values = ArmValues(2, 1.0)
    values.add(1, 1.0, 1.0)
    values.add(1, 9.0, 4.0)
    assert values.ratio(1) == pytest.approx(2.0) and values.ratio(0) is None and values.relative(1) == 1.0


@pytest.mark.parametrize("goal", ["latency", "throughput"])
def test_it_uses_limits_that_are_better(goal):
    policy = LearnedPolicy(OWN, times(), goal)
    better = policy.arms[2]
    play(policy, 400, lambda limits, _: 0.008 if limits == better else 0.01)
    assert policy.decisions[better] > 0.7 * policy.decisions.total()
    assert 0 < policy.regret < 0.05 * 400 * 16 * 0.01


@pytest.mark.parametrize("seed", range(5))
def test_the_guard_bounds_losses_when_costs_turn_against_it(seed):
    """Others than the own limits are better until they have been learned, and then take twice as long."""
    policy, own = LearnedPolicy(OWN, times(), "latency", seed=seed), 0.01
    play(policy, 200, lambda limits, _: own if limits == OWN else 0.8 * own)
    spent = play(policy, 600, lambda limits, _: own if limits == OWN else 2 * own)
    plain = 600 * 16 * own
    period = 16 * 2 * own
    assert spent <= plain * 1.03 + 6 * period


def test_the_guard_when_others_are_always_worse():
    policy = LearnedPolicy(OWN, times(), "latency")
    spent = play(policy, 500, lambda limits, _: 0.01 if limits == OWN else 0.03)
    assert 500 * 16 * 0.01 < spent <= 500 * 16 * 0.01 * 1.03 + 6 * 16 * 0.03


def test_credit():
    credit = Credit(share=0.03, first=2.0, most=4.0)
    assert credit.left
    credit.add(1.0, -1.0)
    assert credit.seconds == pytest.approx(2.0 + 0.03 - 1.0)
    credit.add(1.0, -2.0)
    assert not credit.left
    for _ in range(1000):
        credit.add(1.0, 0.5)
    assert credit.seconds == pytest.approx(4.0)


def test_the_same_steps_and_seed_give_the_same_decisions():
    def decisions(seed):
        policy = LearnedPolicy(OWN, times(), "latency", seed=seed)
        rng = random.Random(1)
        play(policy, 100, lambda *_: rng.uniform(0.005, 0.015))
        return policy.decisions

    assert decisions(1) == decisions(1) != decisions(2)


@pytest.mark.parametrize("stall", [None, 2.5])
def test_arms_keep_within_the_options(stall):
    own = StepLimits(8, 256, stall)
    arms = arms_around(own, drafts=8)
    assert arms[0] == own and len(set(arms)) == len(arms) > 3
    assert all(arm.batch <= 8 and arm.step_tokens <= 256 and (arm.drafts or 0) <= 8 for arm in arms)


def test_policies_by_name():
    assert isinstance(policy_of(EngineOptions(), StepTimes(), 0), FixedPolicy)
    assert limits_of(EngineOptions(stall=3.0)) == policy_of(EngineOptions(stall=3.0), StepTimes(), 0).limits(None)
    assert policy_of(EngineOptions(policy="latency"), StepTimes(), 0).learns
    with pytest.raises(ConfigError, match="policy must be fixed, latency or throughput, got 'best'"):
        policy_of(EngineOptions(policy="best"), StepTimes(), 0)


class Changing:
    """Draws the limits of each step at random."""

    learns = False

    def __init__(self, own: StepLimits) -> None:
        self._rng, self._arms = random.Random(0), [*arms_around(own, 4), StepLimits(1, 16, 1.1, 0), StepLimits(3, 64, None, 1)]

    def limits(self, load):
        return self._rng.choice(self._arms)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("invariant", [False, True])
def test_texts_do_not_depend_on_the_limits(learned, invariant):
    rng = random.Random(3)
    prompts = [[rng.randrange(VOCAB - 1) for _ in range(rng.randrange(1, 200))] for _ in range(30)]
    texts = [expected(prompt, 40) for prompt in prompts]
    scripts = {1 + n: prompts[n % 30] + texts[n % 30] for n in range(60)}
    core = make_core(
        proposers=[(ScriptedProposer(scripts, 0.6, VOCAB), 4)], batch_size_range=(1, 8), step_tokens=128, stall=2.5,
        batch_invariant=invariant, policy="latency" if learned else "fixed",
    )  # fmt: skip
    if not learned:
        core.policy = Changing(limits_of(core.options))
    sampling = SamplingParams(temperature=0, max_tokens=40)
    for _ in range(2):  # a period ends when the engine has been idle
        answers = run(core, *(Request(prompt, sampling, id=str(n)) for n, prompt in enumerate(prompts)))
        assert [answers[str(n)].token_ids for n in range(30)] == texts
    if learned:
        assert core.policy.decisions.total() > 0
