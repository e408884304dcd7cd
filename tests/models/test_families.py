"""From config to graph: names of weights, windows, and every kind of invalid config."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from deepseek_optimizer.errors import ConfigError, UnsupportedModelError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.analysis import weight_shapes
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.integration.configs import check_config
from deepseek_optimizer.models import SUPPORTED, build_graph
from support.family_configs import llama, qwen2, qwen3, rope
from support.models import CASES, random_model

BUFFERS = ("correction_bias", "expert_bias", "layer_scalar", "tid2eid")


@pytest.mark.parametrize("case", CASES)
def test_graph_names_every_parameter_of_the_model(case: str) -> None:
    model = random_model(CASES[case]())
    graph = build_graph(model.config)
    check_graph(graph)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}  # tied heads are listed once
    shapes |= {name: tuple(b.shape) for name, b in model.named_buffers() if name.endswith(BUFFERS)}
    assert set(graph.weights()) == set(shapes)
    assert weight_shapes(graph) == weight_shapes(rules.apply(graph)[0]) == shapes
    assert graph.family == case.split("-")[0]


@pytest.mark.parametrize("case", CASES)
def test_config_is_not_modified_and_its_file_is_checked_too(case: str) -> None:
    config = CASES[case]()
    before = copy.deepcopy(config.to_dict())
    build_graph(config)
    assert config.to_dict() == before
    check_config(json.loads(config.to_json_string(use_diff=False)))


def test_a_config_with_only_the_base_of_rope() -> None:
    """Like R1-Distill-Qwen-1.5B's; `rope_scaling`, a property of the class, is not a default."""
    raw = {name: value for name, value in qwen2().to_dict().items() if not name.startswith("rope_")}
    check_config(raw)
    check_config({**raw, "rope_theta": 10000})


def test_old_names_of_rope_fields_and_missing_fields() -> None:
    """A config.json of Transformers 4: rope_theta and rope_scaling, without head_dim and key-value heads."""
    raw = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "rope_theta": 5e5,
           "rope_scaling": {"type": "linear", "factor": 2.0}}  # fmt: skip
    check_config(raw)
    raw["rope_scaling"] = {"type": "linear"}
    with pytest.raises(ConfigError, match="factor"):
        check_config(raw)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (qwen2(use_sliding_window=True, sliding_window=9, max_window_layers=2), [0, 0, 9]),
        (qwen2(use_sliding_window=False, sliding_window=9, max_window_layers=0), [0, 0, 0]),
        (qwen3(use_sliding_window=True, sliding_window=9, max_window_layers=0), [9, 9, 9]),
        (llama(), [0, 0, 0]),
    ],
)
def test_windows(config: Any, windows: list[int]) -> None:
    attentions = [n for n in build_graph(config).nodes if n.op == "attention"]
    assert [n.attrs["window"] for n in attentions] == windows


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "", None, 7, ["llama"]])
def test_an_unknown_family_lists_the_supported_ones(model_type: Any) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        check_config({"model_type": model_type})
    assert all(family in str(error.value) for family in SUPPORTED)


@pytest.mark.parametrize("raw", [None, [], "llama", 3])
def test_a_config_that_is_not_an_object(raw: Any) -> None:
    with pytest.raises(ConfigError):
        check_config(raw)


BAD_INTEGERS = [0, -1, 10**9, 10**400, 1.5, "8", True, [], math.nan]
BAD_NUMBERS = [0, -1e-6, math.nan, math.inf, 10**400, "1e-6", None, True]
INTEGERS = [
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size",
]  # fmt: skip


def raw_config(**fields: Any) -> dict[str, Any]:
    return {**json.loads(llama().to_json_string(use_diff=False)), **fields}


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", BAD_INTEGERS)
def test_invalid_integers_are_rejected_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"config\.{field}: .*got"):
        check_config(raw_config(**{field: value}))


@pytest.mark.parametrize("value", [0, -1, 2**31, "8", None])
def test_bad_context_length(value: Any) -> None:
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        check_config(raw_config(max_position_embeddings=value))


@pytest.mark.parametrize("value", [number for number in BAD_NUMBERS if number != 0] + [-1e-9, 1e39])
def test_bad_eps(value: Any) -> None:
    with pytest.raises(ConfigError, match="rms_norm_eps"):
        check_config(raw_config(rms_norm_eps=value))


@pytest.mark.parametrize("value", [0.0, 1e-300, 1.0, 2.5, 1e38])
def test_eps_as_in_transformers(value: float) -> None:
    check_config(raw_config(rms_norm_eps=value))


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [-1, 10**9, {}, [], True, "nn", "float", "int8", "x" * 10_000])
def test_bad_dtype(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"config\.{field}: expected one of float32") as caught:
        check_config(raw_config(**{field: value}))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [None, "bfloat16", "float32", "float16"])
def test_dtypes(value: Any) -> None:
    check_config(raw_config(torch_dtype=value))


@pytest.mark.parametrize("field", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", [0, 1, "yes", None, {}])
def test_bad_flag(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        check_config(raw_config(**{field: value}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": None}, "num_attention_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"head_dim": 1 << 19}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_act": None}, "hidden_act"),
        ({"rope_parameters": "default"}, "rope_parameters"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "spiral", "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "short_factor"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0]}}, "long_factor"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
        ({"rope_parameters": {"rope_type": ["default"]}}, "rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        (rope("yarn", factor=4.0, partial_rotary_factor=0.5), "partial_rotary_factor"),
        (rope("dynamic", factor=4.0) | {"head_dim": 2}, "rope_parameters"),  # its formula divides by head_dim - 2
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}}, "rope_parameters"),  # log(theta) is 0
    ],
)
def test_contradictions_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(raw_config(**fields))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
@pytest.mark.parametrize("value", [0, -4.0, math.nan, math.inf, "4", None, True])
def test_bad_rope_factor(kind: str, value: Any) -> None:
    parameters = {"factor": value, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    with pytest.raises(ConfigError, match="factor"):
        check_config(raw_config(**rope(kind, **parameters)))


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "big", True])
def test_bad_rope_theta(value: Any) -> None:
    with pytest.raises(ConfigError, match="rope_theta"):
        check_config(raw_config(rope_parameters={"rope_type": "default", "rope_theta": value}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": 3}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 3, "use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
        ({"layer_types": ["sliding_attention"] * 3, "use_sliding_window": True, "sliding_window": "9"}, "sliding_window"),
        ({"layer_types": None, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": "1"}, "max_window_layers"),
    ],
)
def test_bad_windows(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config({**json.loads(qwen2().to_json_string(use_diff=False)), **fields})


def test_config_objects_are_checked_too() -> None:
    config = llama()
    object.__setattr__(config, "num_hidden_layers", -1)
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        build_graph(config)
