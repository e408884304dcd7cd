"""Options of applications, without a cluster."""

from __future__ import annotations

import pytest
import ray

from deepseek_optimizer.errors import CheckpointError, ConfigError
from deepseek_optimizer.ray import deployment
from deepseek_optimizer.server.served_model import ServedModel
from deepseek_optimizer.server.settings import ServerSettings
from deepseek_optimizer_cli.serve_ray import RayOptions, serve_on_ray


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


def test_a_model_that_is_missing_is_reported_before_ray_starts(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        serve_on_ray(RayOptions(True, None, 2, None, None), ServedModel(str(tmp_path / "none")), ServerSettings())
    assert not ray.is_initialized()
