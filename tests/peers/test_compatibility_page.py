"""The stored results of vLLM's tests, and the page of the documentation that is made from them."""

from __future__ import annotations

from peers import report
from peers.run import LEAST
from peers.suites import SUITES
from peers.tally import share

VLLM = next(suite for suite in SUITES if suite.name == "vLLM")


def test_the_page_shows_the_results():
    assert report.section(VLLM, report.stored()[VLLM.name]) in report.PAGE.read_text(encoding="utf-8"), (
        "run: PYTHONPATH=tests python -m peers.report"
    )


def test_enough_tests_pass_and_the_others_have_explanations():
    files = report.stored()[VLLM.name]
    assert share(files) >= LEAST
    assert not [test for one in files.values() for test in one.unexplained]
    known = {(one.kind, one.why) for one in VLLM.deviations}
    assert {(kind, why) for one in files.values() for kind, reasons in one.explained.items() for why in reasons} <= known
    assert all(one.why and not one.why.endswith(".") for one in VLLM.deviations)
