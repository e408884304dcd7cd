"""Configs of encoders: what their graphs contain, and what is refused."""

from __future__ import annotations

import pytest

from deepseek_optimizer import ConfigError, UnsupportedModelError
from deepseek_optimizer.graph.ir import NO_CACHE
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.models import ENCODERS, build_encoder_graph
from support.encoders import CASES, random_encoder

TYPES = ("full_attention", "sliding_attention")


def config_of(case, **fields):
    config = random_encoder(case).config
    for name, value in fields.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("case", CASES)
def test_graphs(case):
    graph = build_encoder_graph(config_of(case))
    check_graph(graph)
    assert graph.cache == NO_CACHE and not graph.has_head and graph.family == CASES[case][0]


def test_every_family_has_a_case():
    assert {model_type for model_type, _, _ in CASES.values()} == set(ENCODERS)


def test_modernbert_alternates_windows():
    graph = build_encoder_graph(config_of("modernbert"))
    windows = [node.attrs["window"] for node in graph.nodes if node.op == "encoder_attention"]
    assert windows == [0, 5, 5]
    thetas = [node.attrs["rope"].inv_freq[1] for node in graph.nodes if node.op == "rope_table"]
    assert len(thetas) == 2 and thetas[0] < thetas[1]


@pytest.mark.parametrize(
    ("case", "fields", "error", "message"),
    [
        ("bert", {"is_decoder": True}, UnsupportedModelError, "is_decoder"),
        ("bert", {"add_cross_attention": True}, UnsupportedModelError, "add_cross_attention"),
        ("bert", {"position_embedding_type": "relative_key"}, UnsupportedModelError, "position_embedding_type"),
        ("roberta", {"hidden_act": "relu"}, UnsupportedModelError, "hidden_act 'relu' is not supported. Supported: 'gelu'"),
        ("bert", {"num_attention_heads": 5}, ConfigError, "5 does not divide hidden_size 36"),
        ("bert", {"num_attention_heads": 4}, UnsupportedModelError, "heads of 9 elements are not supported"),
        (
            "bert",
            {"hidden_size": 516, "num_attention_heads": 2},
            UnsupportedModelError,
            "heads of 258 elements are not supported",
        ),
        ("bert", {"num_hidden_layers": 1 << 20}, ConfigError, "num_hidden_layers"),
        ("distilbert", {"dim": 1 << 30}, ConfigError, "config.dim"),
        ("modernbert", {"layer_types": ["full_attention", "other", "full_attention"]}, UnsupportedModelError, "'other'"),
        ("modernbert", {"local_attention": 1}, ConfigError, "local_attention"),
        (
            "modernbert",
            {"rope_parameters": dict.fromkeys(TYPES, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})},
            UnsupportedModelError,
            "dynamic RoPE",
        ),
    ],
)
def test_refused(case, fields, error, message):
    with pytest.raises(error, match=message):
        build_encoder_graph(config_of(case, **fields))


def test_decoders_are_not_encoders():
    from transformers import LlamaConfig

    with pytest.raises(UnsupportedModelError, match="'llama' is not an encoder. Supported: bert"):
        build_encoder_graph(LlamaConfig())
