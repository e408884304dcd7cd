"""The comparison detects failures: unlisted deviations are reported, listed ones are not; long or outdated lists are errors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conformance.compare import compare, faults
from conformance.exceptions import KINDS, MAX, Kind
from support.outcomes import Outcome

KIND = Kind("casts", "why", r"test_cast_\w+", "cannot be cast")
PASSED = Outcome("passed")


def one(optimized, control=PASSED, test="test_cast_half", kinds=(KIND,)):
    return compare("llama", {test: control}, {} if optimized is None else {test: optimized}, kinds)


def test_equal_runs_have_no_faults():
    assert faults([one(PASSED)], ()) == []


def test_failures_on_both_sides_are_not_deviations():
    failed = Outcome("failed", "anything")
    assert one(failed, control=failed).deviations == []


@pytest.mark.parametrize(
    "outcome",
    [Outcome("failed", "Error: 1 != 2"), Outcome("skipped", "why not"), Outcome("crashed", "cannot be cast"), None],
    ids=["another error", "skipped", "crashed", "not run"],
)
def test_deviations_are_reported(outcome):
    made = one(outcome)
    assert [test for test, _ in made.deviations] == ["test_cast_half"]
    assert "test_cast_half passes on the plain model" in faults([made], (KIND,))[0]


def test_a_listed_error_in_another_test_is_reported():
    assert one(Outcome("failed", "cannot be cast"), test="test_greedy").deviations


def test_a_listed_error_in_another_family_is_reported():
    failed = Outcome("failed", "it cannot be cast")
    assert one(failed, kinds=(replace(KIND, families=("mistral",)),)).deviations
    assert not one(failed, kinds=(replace(KIND, families=("mistral", "llama")),)).deviations


def test_listed_exceptions_are_counted_by_kind():
    made = one(Outcome("failed", "Error:\nit cannot be cast"))
    assert made.excused == [("casts", "test_cast_half")]
    assert faults([made], (KIND,)) == []
    assert made.line() == "llama: control 1, optimized 0; exceptions: casts 1"


def test_an_exception_that_passes_is_stale():
    assert faults([one(PASSED)], (KIND,)) == ["the exception 'casts' explains nothing any more: remove it"]
    assert faults([one(PASSED)], (KIND,), whole=False) == []


def test_a_control_without_passes_is_an_error():
    assert faults([one(PASSED, control=Outcome("skipped"))], ()) == ["llama: no test passed on the plain model"]


def test_the_list_is_short_and_explained():
    assert len(KINDS) <= MAX == 10
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert all(kind.why for kind in KINDS)
    assert faults([], [KIND] * 11)[0].startswith("11 kinds")
