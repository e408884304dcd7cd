import pytest
import torch

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.prune.selection import most_important, remaining


@pytest.mark.parametrize(
    "fraction, count, multiple, left",
    [(0.25, 30, 1, 22), (0.25, 1536, 32, 1152), (0.5, 3, 1, 2), (0.99, 4, 1, 1), (0.9, 64, 32, 32)],
)
def test_the_nearest_number_stays(fraction, count, multiple, left):
    assert remaining("depth", fraction, count, multiple) == left


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, float("nan")])
def test_what_is_no_fraction_is_refused(fraction):
    with pytest.raises(ConfigError, match="mlp: must be a fraction above 0 and below 1"):
        remaining("mlp", fraction, 64)


@pytest.mark.parametrize("count, multiple", [(4, 1), (32, 32)])
def test_a_fraction_that_changes_nothing_is_refused(count, multiple):
    with pytest.raises(ConfigError, match=r"heads: 0.1 of \d+ leaves out none.*larger fraction"):
        remaining("heads", 0.1, count, multiple)


def test_the_highest_scores_stay_and_of_equal_ones_the_first():
    assert most_important(torch.tensor([1.0, 5.0, 1.0, 7.0, 1.0]), 3) == (0, 1, 3)


def test_every_group_keeps_as_many():
    assert most_important([9, 8, 7, 1, 2, 3], 4, groups=2) == (0, 1, 4, 5)
