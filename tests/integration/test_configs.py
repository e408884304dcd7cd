"""Contents of config.json files with the defaults of Transformers' classes."""

from __future__ import annotations

import json

import pytest

from deepseek_optimizer import ConfigError, UnsupportedModelError
from deepseek_optimizer.graph.printing import to_text
from deepseek_optimizer.integration.configs import check_config, with_defaults
from deepseek_optimizer.models import build_graph
from support.family_configs import llama, qwen2


@pytest.mark.parametrize("make", [llama, qwen2])
def test_missing_fields_have_the_class_defaults(make):
    config = make(rms_norm_eps=make().__class__.rms_norm_eps)
    raw = json.loads(config.to_json_string())
    del raw["rms_norm_eps"]
    assert to_text(build_graph(with_defaults(raw))) == to_text(build_graph(config))
    with pytest.raises(ConfigError, match="rms_norm_eps"):
        build_graph(raw)
    assert with_defaults({"model_type": "llama", "rms_norm_eps": 0.5})["rms_norm_eps"] == 0.5


def test_fields_without_a_default_are_absent():
    actual = with_defaults({"model_type": "llama"})
    assert "rope_scaling" not in actual and "no_such_field" not in actual and actual.get("rope_scaling", 3) == 3
    assert list(actual) == ["model_type"] and len(actual) == 1


@pytest.mark.parametrize("raw", [{"model_type": "gpt2"}, {}, [], None])
def test_other_contents_are_unchanged(raw):
    assert with_defaults(raw) is raw
    with pytest.raises((ConfigError, UnsupportedModelError)):
        check_config(raw)
