"""Errors of other processes arrive with their type, message and attributes."""

from __future__ import annotations

import pickle

import pytest

from deepseek_optimizer import errors
from deepseek_optimizer.errors import DeepSeekOptimizerError, _unpickled


def all_of(kind: type[DeepSeekOptimizerError]) -> list[type[DeepSeekOptimizerError]]:
    return [kind, *(each for below in kind.__subclasses__() for each in all_of(below))]


@pytest.mark.parametrize("kind", sorted(set(all_of(DeepSeekOptimizerError)), key=lambda kind: kind.__name__))
def test_errors_can_be_pickled(kind):
    error = _unpickled(kind, ("what; remedy",), {"limit": "a limit", "needed": 3})
    assert str(error) == "what; remedy"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error) and (again.limit, again.needed) == ("a limit", 3)


def test_an_error_with_several_arguments():
    again = pickle.loads(pickle.dumps(errors.NotEnoughMemoryError("weights", 2_000_000_000, 1_000_000_000, "use int4")))
    assert str(again) == "weights: 2.00 GB needed, but only 1.00 GB free; use int4" and again.free == 1_000_000_000
