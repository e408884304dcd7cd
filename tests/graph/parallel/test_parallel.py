"""The setting `parallel`: what is refused, with the field and the remedy."""

from __future__ import annotations

import pytest

from deepseek_optimizer import ConfigError, DeepSeekConfig
from deepseek_optimizer.graph.parallel import Parallel


@pytest.mark.parametrize(
    ("parallel", "text"),
    [
        (2, "must be a dict"),
        ({"tensors": 2}, "no field 'tensors'"),
        ({"tensor": 0}, "tensor must be an integer"),
        ({"tensor": True}, "tensor must be an integer"),
        ({"expert": 0}, "expert must be an integer"),
        ({"tensor": 16, "expert": 8}, "are 128 processes; there can be 64 at most"),
        ({"pipeline": 2, "tensor": 2}, "tensor=2, pipeline=2 cannot be combined"),
    ],
)
def test_invalid_settings(parallel, text):
    with pytest.raises(ConfigError, match=text):
        DeepSeekConfig(parallel=parallel)


def test_a_config_keeps_it():
    config = DeepSeekConfig(parallel={"tensor": 2})
    assert config.parallel == Parallel(tensor=2) and config.parallel.ranks == 2
    assert config.to_dict()["parallel"] == {"tensor": 2, "expert": 1, "pipeline": 1}
    assert DeepSeekConfig.from_dict(config.to_dict()) == config
    assert DeepSeekConfig().parallel.ranks == 1
