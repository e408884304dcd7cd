"""The marks of tests/support/rings.py decide which tests run when."""

from __future__ import annotations

from itertools import product

from support import rings as module
from support.rings import FAST_S, FEW, WIDE_S, WIDE_SHARE, covering, listed, rings

pytest_plugins = ["pytester"]

PRODUCT = [{"family": a, "format": b, "isa": c} for a, b, c in product(range(FEW), range(3), range(FEW))]


def marks(cases, cost=0.0, seed="s"):
    return rings("a::test", cases, cost, seed)


def values(cases):
    return {value for case in cases for value in case.items()}


def test_few_cases_all_run():
    assert marks([{}]) == [None]
    assert marks(PRODUCT[:FEW]) == [None] * FEW


def test_products_are_sampled_and_every_value_occurs():
    wide = set()
    for seed in range(20):
        actual = marks(PRODUCT, seed=str(seed))
        fast = [case for case, mark in zip(PRODUCT, actual, strict=True) if mark is None]
        assert len(fast) == FEW and values(fast) == values(PRODUCT)
        drawn = {i for i, mark in enumerate(actual) if mark == "wide"}
        assert len(drawn) < len(PRODUCT) / 4
        wide |= drawn
    assert len(wide) > len(PRODUCT) / 3


def test_remaining_values_are_drawn_for_the_next_ring():
    many = [{"a": i, "b": j} for i in range(30) for j in range(3)]
    seen = set()
    for seed in range(120):
        actual = marks(many, seed=str(seed))
        run = values(case for case, mark in zip(many, actual, strict=True) if mark != "slow")
        assert actual.count(None) == FEW and run != values(many)
        seen |= run
    assert seen == values(many)


def test_some_of_the_functions_that_take_long_run_in_the_next_ring():
    actual = [marks([{}], FAST_S * 1.1, seed=str(seed))[0] for seed in range(400)]
    assert set(actual) == {"wide", "slow"} and abs(actual.count("wide") - 400 * WIDE_SHARE) < 40


def test_only_the_second_ring_depends_on_the_seed():
    one, other = marks(PRODUCT, seed="1"), marks(PRODUCT, seed="2")
    assert one == marks(PRODUCT, seed="1") and one != other
    assert [mark is None for mark in one] == [mark is None for mark in other]


def test_expensive_functions_run_fewer_cases():
    cost = FAST_S / 2
    actual = marks(PRODUCT, cost)
    assert actual.count(None) == 2 and actual.count("wide") <= WIDE_S / cost


def test_very_expensive_cases_are_drawn_at_random():
    actual = [marks([{}], 4 * WIDE_S, seed=str(seed))[0] for seed in range(400)]
    assert set(actual) == {"wide", "slow"} and 0 < actual.count("wide") < 200 * WIDE_SHARE


def test_covering_is_small():
    assert len(covering(PRODUCT)) == FEW
    assert covering(PRODUCT, chosen=range(len(PRODUCT))) == []


def test_wide_txt_is_valid():
    assert all(cost > 0 and "::" in name for name, cost in listed().items())


def test_a_session_of_each_ring(pytester, monkeypatch):
    monkeypatch.setattr(module, "LIST", module.LIST)  # the session below changes it
    listed = pytester.path / "wide.txt"
    listed.write_text(f"{WIDE_S:.1f} test_x.py::test_long\n")
    pytester.makeconftest(
        f"from support import rings\nrings.LIST = rings.Path({str(listed)!r})\n"
        "def pytest_configure(config):\n"
        "    config.addinivalue_line('markers', 'wide')\n    config.addinivalue_line('markers', 'slow')\n"
        "    config.pluginmanager.register(rings.Rings('seed'))\n"
    )
    pytester.makepyfile(
        test_x="import pytest\n@pytest.mark.parametrize('i', range(40))\ndef test_many(i): pass\ndef test_long(): pass\n"
    )
    pytester.runpytest_inprocess("-m", "not slow and not wide").assert_outcomes(passed=FEW, deselected=41 - FEW)
    drawn = pytester.runpytest_inprocess("-m", "wide").parseoutcomes()["passed"]
    assert abs(drawn - WIDE_SHARE * (41 - FEW)) <= 1.5
    pytester.runpytest_inprocess("-m", "slow").assert_outcomes(passed=41 - FEW - drawn, deselected=FEW + drawn)
    pytester.runpytest_inprocess("-m", "").assert_outcomes(passed=41)
    listed.write_text("9.0 test_x.py::test_gone\n")
    pytester.runpytest_inprocess().stderr.fnmatch_lines(["*test_x.py::test_gone, which does not exist*"])
    listed.write_text("9.0 test_moved.py::test_many\n")
    pytester.runpytest_inprocess().stderr.fnmatch_lines(["*test_moved.py::test_many, which does not exist*"])
