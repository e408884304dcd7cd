"""Options of applications, without a cluster."""

from __future__ import annotations

import pytest

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.ray import deployment


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("state_dir", {"server": {"state_dir": "states"}}),
        ("prefix_cache_dir", {"engine": {"prefix_cache_dir": "cache"}}),
        ("allow_lora_loading", {"server": {"allow_lora_loading": True, "lora_dir": "adapters"}}),
        ("sleep_mode", {"server": {"sleep_mode": True}}),
        ("port", {"server": {"port": 80}}),
    ],
)
def test_options_that_would_change_one_replica_are_refused(name: str, options) -> None:
    with pytest.raises(ConfigError, match=name):
        deployment("model", **options)
