"""Records the outcomes of tests in a file, so that another process can read them even if the process of the tests crashes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Outcome:
    """Outcome of one test: "passed", "failed", "skipped", or "crashed" if the process ended in it.
    Other plugins may record others.

    Attributes:
        error: the message of the exception, or the reason of a skip.
    """

    outcome: str
    error: str = ""


class Recorder:
    """A pytest plugin that appends a line of JSON for each start and each report of a test.

    Args:
        path: of the file, which is created.
        whole_id: record the node id (path and name); otherwise only the name.
    """

    def __init__(self, path: str | Path, *, whole_id: bool = False) -> None:
        self._path, self._whole_id = path, whole_id

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(nodeid, "started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Handles reports of subtests too: a failed one makes the test failed even if it reports success afterwards."""
        if report.when == "call" or report.outcome != "passed":
            self.write(report.nodeid, report.outcome, _error(report))

    def write(self, nodeid: str, outcome: str, error: str = "") -> None:
        name = nodeid if self._whole_id else nodeid.rpartition("::")[2]
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"test": name, "outcome": outcome, "error": error}) + "\n")


def _error(report: pytest.TestReport) -> str:
    """The message of the exception, or the reason of a skip."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[-1])
    return str(getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longrepr or ""))


def read_outcomes(path: Path) -> dict[str, Outcome]:
    """Reads what a `Recorder` wrote; a test with several reports (subtests) failed if any of them failed."""
    result: dict[str, Outcome] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        test, outcome = entry["test"], entry["outcome"]
        if outcome == "started":
            result[test] = Outcome("crashed", "the process ended in this test")
        elif outcome not in ("passed", "skipped") or test not in result or result[test].outcome != "failed":
            result[test] = Outcome(outcome, entry["error"])
    return result
