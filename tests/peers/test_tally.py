"""What is not explained is reported; explanations without a test are, too; the page of the documentation shows the results."""

from __future__ import annotations

import pytest

from peers.deviations import Deviation
from peers.left_out import LEFT_OUT
from peers.run import run_suite
from peers.source import Distribution
from peers.suites import Suite
from peers.tally import FileTally, functions, share, tally
from peers.values import is_text_of_their_model
from support.outcomes import Outcome, Recorder, read_outcomes

DIFFERS = Deviation("differs", "on purpose", r"a\.py::test_b.*")
EXTENSION = Deviation("extension", "theirs", r"a\.py::test_c")


def test_outcomes_are_counted_by_their_explanation():
    outcomes = {
        "a.py::test_a": Outcome("passed"),
        "a.py::test_b[1]": Outcome("failed", "403"),
        "a.py::test_c": Outcome(LEFT_OUT),
        "a.py::test_d": Outcome("skipped"),
        "a.py::test_e": Outcome("failed", "404"),
        "a.py::test_f": Outcome("crashed"),
    }
    made, used = tally(outcomes, (DIFFERS, EXTENSION))
    assert (made.passed, made.skipped, made.count("differs"), made.count("extension")) == (1, 1, 1, 1)
    assert [name for name, _ in made.unexplained] == ["a.py::test_e", "a.py::test_f"]
    assert used == {DIFFERS, EXTENSION}
    assert share({"a.py": made}) == 1 / 4
    assert FileTally.read(made.stored()).stored() == made.stored()


def test_a_difference_that_passes_is_not_used():
    made, used = tally({"a.py::test_b": Outcome("passed")}, (DIFFERS,))
    assert made.passed == 1 and not used


def test_an_extension_that_was_run_is_not_explained():
    assert tally({"a.py::test_c": Outcome("failed")}, (EXTENSION,))[0].unexplained


def test_the_outcomes_of_a_run_are_read(tmp_path):
    recorder = Recorder(tmp_path / "results.jsonl", whole_id=True)
    for test, outcome in (
        ("a", "started"),
        ("a", "failed"),
        ("a", "passed"),
        ("b", "started"),
        ("b", "passed"),
        ("c", "started"),
    ):
        recorder.write(test, outcome)
    recorder.write("d", LEFT_OUT)
    found = read_outcomes(tmp_path / "results.jsonl")
    assert {test: outcome.outcome for test, outcome in found.items()} == {
        "a": "failed", "b": "passed", "c": "crashed", "d": LEFT_OUT,
    }  # fmt: skip


PLUGIN = """
import os
from peers.deviations import Deviation
from peers.left_out import RESULTS, LeftOut
from support.outcomes import Recorder

def pytest_configure(config):
    recorder = Recorder(os.environ[RESULTS], whole_id=True)
    config.pluginmanager.register(recorder)
    config.pluginmanager.register(LeftOut([Deviation("extension", "theirs", r".*::test_theirs")], recorder))
"""


def test_a_suite_is_run_file_by_file(tmp_path):
    (tmp_path / "sample_plugin.py").write_text(PLUGIN)
    (tmp_path / "test_one.py").write_text("def test_ours(): pass\ndef test_theirs(): assert 0\ndef test_wrong(): assert 0\n")
    (tmp_path / "test_two.py").write_text("import no_such_package\ndef test_a(): pass\nasync def test_b(): pass\n")
    deviations = (
        Deviation("extension", "theirs", r".*::test_theirs"),
        Deviation("internal", "their classes", r"test_two\.py"),
        Deviation("differs", "never", r"test_one\.py::test_gone"),
    )
    suite = Suite(
        name="sample", title="", distribution=Distribution("p", "1", "", ()), folder=".", files=("test_*.py",), starts="test",
        plugin="sample_plugin", arrange=lambda target: None, deviations=deviations,
    )  # fmt: skip
    made, faults = run_suite(suite, tmp_path, tmp_path, (), "")
    assert (made["test_one.py"].passed, made["test_one.py"].count("extension"), made["test_two.py"].count("internal")) == (
        1,
        1,
        2,
    )
    assert len(faults) == 3
    assert "test_wrong" in faults[0] and "explains nothing" in faults[1] and "50% of the tests" in faults[2]


def test_async_functions_are_counted(tmp_path):
    (tmp_path / "a.py").write_text("def test_a(): pass\nasync def test_b(): pass\ndef helper(): pass\n")
    assert functions(tmp_path / "a.py") == 2


@pytest.mark.parametrize(
    ("regex", "theirs"),
    [
        ("(little|girl)+", True),
        ("^ blue", True),
        ("Whillicter", True),
        ("a{5,5}", False),
        ('"42"', False),
        ("(\\{|John)+", False),
    ],
)
def test_what_a_grammar_requires_is_no_text_of_a_model(regex, theirs):
    assert is_text_of_their_model(regex) == theirs
