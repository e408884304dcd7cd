"""The stored results of llama.cpp's server tests, which `python -m peers.run llama-server --write` updates."""

from __future__ import annotations

import pytest

from peers.report import stored
from peers.run import LEAST
from peers.tally import share


@pytest.fixture(scope="module")
def files():
    return stored()["llama-server"]


def test_every_test_that_does_not_pass_is_explained(files):
    assert [(name, one.unexplained) for name, one in files.items() if one.unexplained] == []


def test_the_share_of_tests_that_pass(files):
    assert share(files) >= LEAST


def test_all_files_of_the_suite_have_results(files):
    """Those that start a server: 26 in llama-cpp-python 0.3.36."""
    names = {name.removeprefix("unit/test_").removesuffix(".py") for name in files}
    assert {"embedding", "template", "tool_call", "completion", "chat_completion", "metrics", "security", "sleep"} <= names
    assert all(one.passed or one.explained for one in files.values())
