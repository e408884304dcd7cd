"""The choice of the draft length, with simulated costs and acceptance rates: finds the fastest; losses are bounded."""

from __future__ import annotations

import random

import pytest

from deepseek_optimizer.engine.speculative.costs import StepCosts
from deepseek_optimizer.engine.speculative.draft_length import MAX, DraftLengthController

# Cost of an additional row relative to a plain step: memory-bound weights; experts, whose work grows with the rows.
CHEAP, STEEP = 0.06, 0.55


def simulate(
    tokens, agree, row, *, max_drafts=3, sequences=1, seed=0, plain=10e-3, noise=0.0, controller=None, several=False
):  # fmt: skip
    """Decodes `tokens` tokens per sequence. agree: round number -> probability that a draft is accepted. several: whether
    rounds without drafts run in calls of several.

    Returns: the controller, and plain decoding's time over the time taken.
    """
    rng, controller = random.Random(seed), controller or DraftLengthController(max_drafts)
    done, seconds, rounds = 0.0, 0.0, 0
    while done < tokens:
        n = controller.choose(sequences, int(tokens - done) - 1)
        outcomes = []
        for _ in range(sequences):
            held = 0
            while held < n and rng.random() < agree(rounds):
                held += 1
            outcomes.append((n, held))
        took = plain * (1 + row * n) * (1 + noise * rng.random())
        count = min(controller.plain_rounds, int(tokens - done)) if several and not n else 1
        controller.record(took, outcomes, count)
        done += count + sum(held for _, held in outcomes) / sequences
        seconds += count * took
        rounds += count
    return controller, done * plain * (1 + noise / 2) / seconds


@pytest.mark.parametrize("row", [CHEAP, STEEP, 1.0])
@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("tokens", [64, 128, 1000])
@pytest.mark.parametrize("several", [False, True])
def test_rejected_drafts_cost_less_than_three_percent(row, sequences, tokens, several):
    controller, speed = simulate(tokens, lambda _: 0.0, row, sequences=sequences, several=several)
    assert speed >= 0.97
    assert controller.report().drafted > 0  # it tried
    assert controller.report().accepted_length == 1


@pytest.mark.parametrize("seed", range(5))
def test_an_acceptance_of_eighty_percent_is_faster(seed):
    """E(3) = 2.95 at 80%: cheap rows give nearly all of this gain, expensive ones the gain of one or two drafts."""
    best = {CHEAP: 2.95 / 1.18, STEEP: max(1.8 / 1.55, 2.44 / 2.1, 2.95 / 2.65)}
    for row, speed in best.items():
        controller, actual = simulate(2000, lambda _: 0.8, row, seed=seed)
        assert actual > 1 + 0.8 * (speed - 1) if row == CHEAP else actual > 1.04
        assert controller.report().acceptance[0] == pytest.approx(0.8, abs=0.06)
        assert controller.report().speedup == pytest.approx(actual, rel=0.05)


def test_calls_of_several_rounds_last_until_the_next_trial():
    """The same decisions as in single rounds, with few calls."""
    one, several = (simulate(1000, lambda _: 0.0, STEEP, several=several)[0].report() for several in (False, True))
    assert several.rounds == one.rounds == sum(count for _, count in several.chosen)
    assert [n for n, _ in several.chosen] == [n for n, _ in one.chosen]
    controller = DraftLengthController(3)
    simulate(200, lambda _: 0.0, STEEP, controller=controller, several=True)
    calls = []
    for _ in range(10):
        if controller.choose(1):
            controller.record(20e-3, [(1, 0)])
        else:
            calls.append(controller.plain_rounds)
            controller.record(10e-3, [(0, 0)], calls[-1])
    assert sum(calls) > 15 * len(calls)


def test_rounds_with_drafts_in_a_row_are_covered_by_the_credit():
    """Whatever is accepted: as many as it covers if nothing is, and none after the next trial is due."""
    controller, chosen = DraftLengthController(3), []
    for n in range(400):
        drafts = controller.choose(1)
        rounds = controller.drafted_rounds if drafts else controller.plain_rounds
        chosen.append((drafts, rounds))
        for i in range(rounds if drafts else 1):
            controller.record(1.0 + 0.2 * drafts, [(drafts, min(drafts, 2 * (n % 3 > 0)))], follows=i > 0)
    assert max(rounds for drafts, rounds in chosen if drafts) > 4
    assert all(rounds * 0.2 * drafts <= MAX + 1e-9 for drafts, rounds in chosen)
    report = controller.report()
    assert sum(rounds for _, rounds in report.chosen) == report.rounds


def test_a_fixed_number_of_drafts_holds_for_many_rounds():
    controller = DraftLengthController(3, fixed=True)
    assert controller.choose(1) == 3 and controller.drafted_rounds > 8


def test_plain_rounds_between_drafts_are_few():
    controller, longest = DraftLengthController(3), 0
    for _ in range(400):
        n = controller.choose(1)
        count = controller.plain_rounds if not n else 1
        longest = max(longest, count)
        controller.record(1 + 0.06 * n, [(n, n)], count)
    assert longest == 4
    assert controller.report().accepted_length > 3.5


@pytest.mark.parametrize("several", [False, True])
def test_short_requests_gain_too(several):
    _, speed = simulate(64, lambda _: 0.8, CHEAP, several=several)
    assert speed > 1.8


def test_the_text_changes():
    """Drafts stop within some rounds once they are rejected, and start again once they are accepted again."""
    controller = DraftLengthController(3)
    _, first = simulate(400, lambda _: 0.9, CHEAP, controller=controller)
    _, second = simulate(2000, lambda _: 0.0, CHEAP, controller=controller)
    chosen = controller.report().chosen[-1]
    _, third = simulate(3000, lambda _: 0.9, CHEAP, controller=controller)
    assert first > 2
    assert second > 0.96
    assert chosen[0] == 0
    assert third > 1.5


def test_noise_does_not_disable_drafts():
    _, speed = simulate(2000, lambda _: 0.8, CHEAP, noise=0.5)
    assert speed > 1.8


def test_deterministic():
    runs = [simulate(300, lambda _: 0.6, STEEP, noise=0.3, seed=4)[0].report() for _ in range(2)]
    assert runs[0] == runs[1]


def test_no_drafts_without_room():
    controller = DraftLengthController(3)
    for _ in range(5):
        controller.record(1.0, [(0, 0)])
    assert controller.choose(1, 0) == 0
    assert controller.choose(1, 1) <= 1


def test_later_positions_are_drafted_only_if_accepted():
    """The first is always accepted, the second never: one draft remains."""
    controller = DraftLengthController(3)
    rounds = []
    for _ in range(300):
        n = controller.choose(1)
        rounds.append(n)
        controller.record(1 + 0.3 * n, [(n, min(n, 1))])
    assert sum(n == 1 for n in rounds[100:]) > 170
    assert controller.report().acceptance[1] == 0
    assert controller.report().acceptance[0] == 1


def test_report():
    controller = DraftLengthController(2)
    for n, held in ((0, 0), (0, 0), (1, 1), (2, 1), (2, 0)):
        controller.choose(1)
        controller.record(1.0 + n, [(n, held)])
    report = controller.report()
    assert (report.rounds, report.drafted) == (5, 3)
    assert report.accepted_length == pytest.approx((2 + 2 + 1) / 3)
    assert report.proposed == (3, 1)
    assert report.acceptance == (pytest.approx(2 / 3), 0.0)
    assert sum(count for _, count in report.chosen) == 5
    assert report.speedup == pytest.approx(7 / 10)


def test_costs():
    costs = StepCosts()
    assert costs.seconds(1, 0) is None
    costs.add(1, 2, 3.0)
    assert costs.seconds(1, 2) is None  # nothing to compare with yet
    costs.add(1, 0, 1.0)
    assert costs.seconds(1, 1) == 2.0
    assert costs.seconds(1, 3) == 4.0
    assert costs.seconds(2, 1) is None
    costs.add(1, 0, 9.0)
    assert costs.seconds(1, 0) == 1.0  # the smaller of two
    for value in (5.0, 5.0, 5.0):
        costs.add(1, 0, value)
    assert costs.seconds(1, 0) == 5.0
    costs.add(2, 0, 1.0)
    assert costs.seconds(2, 2) == 1.5  # an estimate
