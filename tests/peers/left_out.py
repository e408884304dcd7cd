"""A pytest plugin that leaves out the tests which would have to fail: extensions, other models, other projects' classes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from support.outcomes import Recorder

from .deviations import Deviation, left_out

RESULTS = "DSO_PEERS_RESULTS"  # the file that outcomes are written to
LEFT_OUT = "left out"


class LeftOut:
    """The plugin.

    Args:
        deviations: of the suite.
        recorder: gets the outcome "left out" for each test that is not run.
    """

    def __init__(self, deviations: Sequence[Deviation], recorder: Recorder) -> None:
        self._deviations, self._recorder = deviations, recorder

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, others = [], []
        for item in items:
            (others if left_out(item.nodeid, self._deviations) else kept).append(item)
        for item in others:
            self._recorder.write(item.nodeid, LEFT_OUT)
        if others:
            config.hook.pytest_deselected(items=others)
            items[:] = kept
