"""The learned policy: that it finds the best arm, what its guard allows, and that it does not change texts."""

from __future__ import annotations

import random

import pytest

from deepseek_optimizer import ConfigError
from deepseek_optimizer.engine.options import EngineOptions
from deepseek_optimizer.engine.request import Request, SamplingParams
from deepseek_optimizer.engine.scheduling.arm_values import ArmValues
from deepseek_optimizer.engine.scheduling.batch_size import BatchSize
from deepseek_optimizer.engine.scheduling.budget import PromptBudget
from deepseek_optimizer.engine.scheduling.credit import Credit
from deepseek_optimizer.engine.scheduling.learned_policy import LearnedPolicy, arms_around
from deepseek_optimizer.engine.scheduling.policies import policy_of
from deepseek_optimizer.engine.scheduling.policy import FixedPolicy, Served, StepLimits, limits_of
from deepseek_optimizer.engine.scheduling.queue_model import QueueModel
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


def learned(goal: str = "latency", seed: int = 0) -> LearnedPolicy:
    known = times()

    def model() -> QueueModel:
        return QueueModel(BatchSize(1, 32, known), PromptBudget(512, 2.5, known), known)

    return LearnedPolicy(OWN, known, model, goal, seed)


class Server:
    """Serves requests one after the other, each in 16 steps, in virtual time."""

    def __init__(self, policy: LearnedPolicy) -> None:
        self.policy, self.now, self.number = policy, 0.0, 0

    def play(self, requests: int, seconds_of) -> float:
        """Serves requests, with `seconds_of(limits)` per step; returns the seconds of all steps."""
        began = self.now
        for _ in range(requests):
            self.number += 1
            self.policy.added(self.number, self.now, self.now)
            for step in range(16):
                seconds = seconds_of(self.policy.limits(self.now))
                self.now += seconds
                if step == 15:
                    self.policy.ended(Served(self.number, 1, 15))
                self.policy.stepped(seconds, int(step == 0), int(step > 0))
        return self.now - began


def test_thompson_sampling_finds_the_best_arm_and_follows_a_change():
    rng, values = random.Random(0), ArmValues(4, 0.98)
    for best in (2, 3):
        chosen = []
        for _ in range(600):
            arm = values.sample(rng, [1.0] * 4)
            values.add(arm, 1.0, (0.8 if arm == best else 1.0) * rng.uniform(0.9, 1.1))
            chosen.append(arm)
        assert chosen[-200:].count(best) > 140


def test_what_is_predicted_to_be_worse_is_hardly_tried():
    rng, values = random.Random(0), ArmValues(3, 1.0)
    chosen = [values.sample(rng, [1.0, 0.9, 1.1]) for _ in range(500)]
    assert chosen.count(1) > 490


def test_a_wrong_prediction_is_corrected():
    rng, values = random.Random(0), ArmValues(2, 1.0)
    chosen = []
    for _ in range(300):
        chosen.append(values.sample(rng, [1.0, 0.9]))
        values.add(chosen[-1], [1.0, 0.9][chosen[-1]], [1.0, 1.2][chosen[-1]])
        values.add(0, 1.0, 1.0)
    assert chosen[0] == 1 and chosen[-100:].count(0) > 95


def test_ratios_are_of_sums():
    values = ArmValues(2, 1.0)
    values.add(1, 1.0, 1.0)
    values.add(1, 9.0, 4.0)
    assert values.ratio(1) == pytest.approx(2.0) and values.ratio(0) is None and values.relative(1) == 1.0


@pytest.mark.parametrize("goal", ["latency", "throughput"])
def test_it_uses_limits_that_are_better(goal):
    """Better than the model says: it predicts the same for all limits."""
    policy = learned(goal)
    better = policy.arms[2]
    Server(policy).play(400, lambda limits: 0.008 if limits == better else 0.01)
    assert policy.decisions[better] > 0.7 * policy.decisions.total()
    assert 0 <= policy.regret < 0.05 * 400 * 16 * 0.01


@pytest.mark.parametrize("seed", range(5))
def test_the_guard_bounds_losses_when_costs_turn_against_it(seed):
    """Others than the own limits are better until they have been learned, and then take twice as long."""
    server, own = Server(learned(seed=seed)), 0.01
    server.play(200, lambda limits: own if limits == OWN else 0.8 * own)
    spent = server.play(600, lambda limits: own if limits == OWN else 2 * own)
    plain = 600 * 16 * own
    period = 16 * 2 * own
    assert spent <= plain * 1.03 + 6 * period


def test_the_guard_when_others_are_always_worse():
    policy = learned()
    spent, own = Server(policy).play(500, lambda limits: 0.01 if limits == OWN else 0.03), 500 * 16 * 0.01
    assert own < spent <= own * 1.03 + 6 * 16 * 0.03
    assert policy.regret == pytest.approx(spent - own, abs=0.02 * own)


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
        policy = learned(seed=seed)
        rng = random.Random(1)
        Server(policy).play(100, lambda _: rng.uniform(0.005, 0.015))
        return policy.decisions

    assert decisions(1) == decisions(1) != decisions(2)


@pytest.mark.parametrize("stall", [None, 2.5])
def test_arms_keep_within_the_options(stall):
    own = StepLimits(8, 256, stall)
    arms = arms_around(own)
    assert arms[0] == own and len(set(arms)) == len(arms) == 3
    assert all(arm.batch <= 8 and arm.step_tokens <= 256 for arm in arms)


def test_policies_by_name():
    assert isinstance(policy_of(EngineOptions(), StepTimes()), FixedPolicy)
    assert limits_of(EngineOptions(stall=3.0)) == policy_of(EngineOptions(stall=3.0), StepTimes()).limits(0.0)
    assert policy_of(EngineOptions(policy="latency"), StepTimes()).learns
    with pytest.raises(ConfigError, match="policy must be fixed, latency or throughput, got 'best'"):
        policy_of(EngineOptions(policy="best"), StepTimes())


class Changing:
    """Draws the limits of each step at random."""

    learns = False

    def __init__(self, own: StepLimits) -> None:
        self._rng, self._arms = random.Random(0), [*arms_around(own), StepLimits(1, 16, 1.1), StepLimits(3, 64, None)]

    def limits(self, now):
        return self._rng.choice(self._arms)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("invariant", [False, True])
def test_texts_do_not_depend_on_the_limits(learns, invariant):
    rng = random.Random(3)
    prompts = [[rng.randrange(VOCAB - 1) for _ in range(rng.randrange(1, 200))] for _ in range(30)]
    texts = [expected(prompt, 40) for prompt in prompts]
    scripts = {1 + n: prompts[n % 30] + texts[n % 30] for n in range(60)}
    core = make_core(
        proposers=[(ScriptedProposer(scripts, 0.6, VOCAB), 4)], batch_size_range=(1, 8), step_tokens=128, stall=2.5,
        batch_invariant=invariant, policy="latency" if learns else "fixed",
    )  # fmt: skip
    if not learns:
        core.policy = Changing(limits_of(core.options))
    sampling = SamplingParams(temperature=0, max_tokens=40)
    for _ in range(2):  # a period ends when the engine has been idle
        answers = run(core, *(Request(prompt, sampling, id=str(n)) for n, prompt in enumerate(prompts)))
        assert [answers[str(n)].token_ids for n in range(30)] == texts
    if learns:
        assert core.policy.decisions.total() > 0
