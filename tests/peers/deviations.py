"""Explanations of tests that do not pass, each for a group of tests of one suite."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# extension: of the other server, which no client needs that does not know that server.
# model: the test needs the weights of the model that it names, or a kind of model that `dso serve` does not serve.
# internal: the test calls the other project's classes, not a server.
# differs: the server answers differently on purpose.
Kind = Literal["extension", "model", "internal", "differs"]


@dataclass(frozen=True)
class Deviation:
    """Why some tests do not pass.

    Attributes:
        kind: see `Kind`. Tests that differ are run, and must fail; the others are not run, unless `error` is given.
        why: the reason, a sentence without a period.
        tests: a regular expression that matches the whole id of each test ("unit/test_basic.py::test_no_ui"), or the whole
            path of a file, which is then not even imported.
        error: a regular expression that matches in the error of each, or "" for any.
        endless: whether the test would not end when it fails, so that it is not run although it differs.
    """

    kind: Kind
    why: str
    tests: str
    error: str = ""
    endless: bool = False

    @property
    def runs(self) -> bool:
        """Whether the tests are run."""
        return not self.endless and (self.kind == "differs" or bool(self.error))

    def fits(self, test: str, error: str = "") -> bool:
        return re.fullmatch(self.tests, test, re.DOTALL) is not None and re.search(self.error, error, re.DOTALL) is not None


def left_out(test: str, deviations: Sequence[Deviation]) -> Deviation | None:
    """The reason not to run a test, or a file; None: it is run."""
    return next((one for one in deviations if not one.runs and one.fits(test)), None)


def explanation(test: str, error: str, deviations: Sequence[Deviation]) -> Deviation | None:
    """The reason for an error of a test that was run."""
    return next((one for one in deviations if one.runs and one.fits(test, error)), None)
