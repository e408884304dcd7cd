"""DeepSeekConfig: every field is checked when set, unknown names raise an error with the closest name, JSON round trip."""

from __future__ import annotations

import copy
import json
from dataclasses import fields
from typing import Any

import pytest

from deepseek_optimizer import ConfigError, DeepSeekConfig
from deepseek_optimizer.config import FUSION_RULES
from deepseek_optimizer.graph.parallel import Parallel

GOOD = {
    "precision": ["auto", "int3", "int4", "q4_1", "int8", "int8_nested", "fp8", "bf16", "fp32"],
    "kernel_fusion": [True, False],
    "fusion_rules": [None, [], ["qkv"], ("attention_softmax", "layer_norm")],
    "attention_optimization": ["flash", "eager", "sliding", "sparse"],
    "attention_window": [None, 1, 4096],
    "attention_sinks": [0, 4],
    "attention_budget": [2048],
    "sparse_attention": [True, False],
    "kv_cache": ["auto", "fp32", "bf16", "int8", "fp8", "int4"],
    "kv_cache_memory": [None, 1 << 20],
    "threads": [None, 1, 64],
    "isa": [None, "avx2", "avx512", "amx", "neon"],
    "backend": ["auto", "cpu", "cuda", "reference"],
    "cuda_graphs": [True, False],
    "cpu_expert_layers": [None, 0, 26],
    "activation": ["auto", "int8", "int16"],
    "batch_invariant": [True, False],
    "prefill_chunk": [1, 4096],
    "batch_size_range": [(1, 1), [4, 32]],
    "fast_path": [True, False],
    "mtp": ["auto", "off"],
    "vision": ["auto", "off"],
    "context_extension": [None],  # needs the other field, see below
    "context_length": [None],
    "calibration": [None, "notes.txt"],
    "kl_budget": [None, 0.02, 1],
    "strict": [True, False],
    "formats": [None, {}, {"lm_head": "int8", "model.layers.0.mlp.up_proj": "q4_1"}],
    "parallel": [Parallel(), Parallel(tensor=2)],
    "quant_method": ["deepseek_optimizer"],
}
BAD = {
    "precision": ["int2", None, 4, "INT4", float("nan")],
    "kernel_fusion": [1, "yes", None],
    "fusion_rules": ["qkv", ["qvk"], [1], {"qkv"}],
    "attention_optimization": ["sdpa", None, True],
    "attention_window": [0, -1, True, 1.5, "all"],
    "attention_sinks": [-1, None, True],
    "attention_budget": [0, None, 2.0],
    "sparse_attention": [1, "yes", None],
    "kv_cache": ["fp16", None],
    "kv_cache_memory": [0, -1, 1.5, True, 1 << 62],
    "threads": [0, -1, True, 1.0, "4", 1 << 20],
    "isa": ["sse", ""],
    "backend": ["metal", None],
    "cuda_graphs": [1, "yes"],
    "cpu_expert_layers": [-1, True, "4", 1.5],
    "activation": ["int4", None],
    "batch_invariant": [0, None],
    "prefill_chunk": [0, -1, True, None],
    "batch_size_range": [(0, 1), (4, 2), (1,), 4, (1, 2, 3), (True, 4), (1, float("inf"))],
    "fast_path": ["on", None],
    "mtp": ["on", True, None],
    "vision": ["on", False, None],
    "context_extension": ["ntk", "linear", True],
    "context_length": [0, -1, 1.5, True, "32768", 1 << 31],
    "calibration": ["", " ", "a\0b", 4, b"notes.txt", True],
    "kl_budget": [0, -0.1, float("nan"), float("inf"), "0.02", True],
    "strict": [1, "yes", None],
    "formats": [["int8"], {"lm_head": "int2"}, {"lm_head": None}, {1: "int8"}],
    "parallel": [2, None, [2], {"tensors": 2}, {"tensor": 0}, {"tensor": True}, {"expert": 0}, {"pipeline": 1.5}],
    "quant_method": ["bitsandbytes", None],
}


def test_every_field_has_valid_and_invalid_values():
    names = {f.name for f in fields(DeepSeekConfig)}
    assert names == GOOD.keys() == BAD.keys()


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in GOOD.items() for v in values])
def test_valid_values_at_construction_and_assignment(name, value):
    assert getattr(DeepSeekConfig(**{name: value}), name) == (tuple(value) if isinstance(value, list) else value)
    config = DeepSeekConfig()
    setattr(config, name, value)
    assert config == DeepSeekConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_invalid_values_are_rejected_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        DeepSeekConfig(**{name: value})
    config = DeepSeekConfig()
    before = copy.deepcopy(config)
    with pytest.raises(ConfigError, match=name):
        setattr(config, name, value)
    assert config == before


@pytest.mark.parametrize(("wrong", "right"), [("precison", "precision"), ("kvcache", "kv_cache"), ("num_threads", "threads")])
def test_unknown_names_suggest_the_closest(wrong, right):
    with pytest.raises(ConfigError, match=f"no field '{wrong}'.*'{right}'"):
        DeepSeekConfig(**{wrong: 1})
    with pytest.raises(ConfigError, match=right):
        setattr(DeepSeekConfig(), wrong, 1)


@pytest.mark.parametrize(
    ("fields", "kind", "window"),
    [
        ({}, "flash", 0),
        ({"attention_optimization": "eager"}, "flash", 0),
        ({"attention_optimization": "sliding"}, "sliding", 4096),
        ({"attention_optimization": "sliding", "attention_window": 100}, "sliding", 100),
        ({"attention_optimization": "sparse"}, "sparse", 512),
        ({"sparse_attention": True}, "sparse", 512),
    ],
)
def test_attention_modes(fields, kind, window):
    mode = DeepSeekConfig(**fields).attention
    assert (mode.kind, mode.window) == (kind, window)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparse_attention": True, "attention_optimization": "sliding"}, "choose one"),
        ({"sparse_attention": True, "attention_budget": 576}, "leave nothing to choose"),
    ],
)
def test_incompatible_attention_modes(fields, message):
    with pytest.raises(ConfigError, match=message):
        DeepSeekConfig(**fields).attention  # noqa: B018


def test_the_closest_value_is_suggested():
    with pytest.raises(ConfigError, match="did you mean 'layer_norm'"):
        DeepSeekConfig(fusion_rules=["layernorm"])


def test_json_round_trip():
    config = DeepSeekConfig(
        precision="int4", fusion_rules=["qkv", "gate_up"], threads=3, batch_size_range=(2, 8), kv_cache_memory=1 << 30,
        formats={"lm_head": "int8"},
    )  # fmt: skip
    assert DeepSeekConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert DeepSeekConfig.from_dict(json.loads(config.to_json_string())) == config
    assert DeepSeekConfig(**dict(config)) == config


def test_to_dict_shares_nothing():
    config = DeepSeekConfig(formats={"a": "int4"})
    config.to_dict()["formats"]["a"] = "int8"
    assert config.formats == {"a": "int4"}


def test_transformers_may_keep_private_names():
    config = DeepSeekConfig()
    config._note = "x"
    assert "_note" not in config.to_dict()


def test_transformers_update_and_unused_arguments():
    config, rest = DeepSeekConfig.from_dict({"precision": "int8"}, return_unused_kwargs=True, threads=2, other=1)
    assert (config.precision, config.threads, rest) == ("int8", 2, {"other": 1})
    with pytest.raises(ConfigError, match="threads"):
        config.update(threads=-1)


def test_effective_rules():
    assert DeepSeekConfig().rules == FUSION_RULES
    assert DeepSeekConfig(kernel_fusion=False).rules == ()
    assert DeepSeekConfig(fusion_rules=["gate_up", "qkv"]).rules == ("qkv", "gate_up")
    assert "attention_softmax" not in DeepSeekConfig(attention_optimization="eager").rules
    assert DeepSeekConfig(fusion_rules=["attention_softmax"], attention_optimization="eager").rules == ()


def test_format_of():
    assert DeepSeekConfig(precision="int4").format_of("other.weight", "bf16") == "int4"
    assert DeepSeekConfig().format_of("other.weight", "bf16") == "bf16"


def test_formats_override_precision():
    config = DeepSeekConfig(precision="int4", formats={"head": "int8", "embed": "q4_1"})
    assert [config.format_of(f"{n}.weight", "bf16") for n in ("head", "embed", "other")] == ["int8", "q4_1", "int4"]


def test_a_budget_needs_unquantized_matrices():
    config = DeepSeekConfig(kl_budget=0.1, formats={"head": "int8"})
    assert config.format_of("head.weight", "bf16") == "bf16"


def test_a_budget_and_a_precision_exclude_each_other():
    for both in ({"precision": "int4", "kl_budget": 0.1}, {"kl_budget": 1, "precision": "bf16"}):
        with pytest.raises(ConfigError, match="kl_budget .*leave precision at"):
            DeepSeekConfig(**both)
    config = DeepSeekConfig(kl_budget=0.1)
    with pytest.raises(ConfigError, match="kl_budget"):
        config.precision = "int8"
    assert config == DeepSeekConfig(kl_budget=0.1)
    config.kl_budget = None
    config.precision = "int8"
    with pytest.raises(ConfigError, match="kl_budget"):
        config.kl_budget = 0.1


def test_repr_shows_non_default_fields():
    assert repr(DeepSeekConfig(precision="int8", threads=2)) == "DeepSeekConfig(precision='int8', threads=2)"


def test_every_field_is_documented():
    for field in fields(DeepSeekConfig):
        if field.name != "quant_method":
            assert f"{field.name}:" in DeepSeekConfig.__doc__


class TestFormatsByPattern:
    CONFIG = DeepSeekConfig(
        precision="int4",
        formats={
            "model.layers.*.mlp.experts.*": "int8",
            "model.layers.1.*": "bf16",
            "model.layers.1.mlp.experts.down_proj": "q4_1",
        },
    )

    @pytest.mark.parametrize(
        ("module", "format"),
        [
            ("model.layers.1.mlp.experts.down_proj", "q4_1"),
            ("model.layers.1.mlp.experts.gate_up_proj", "int8"),
            ("model.layers.1.self_attn.o_proj", "bf16"),
            ("model.layers.11.self_attn.o_proj", None),
            ("model.layers.1", None),
            ("lm_head", None),
        ],
    )
    def test_a_name_overrides_patterns_and_the_first_pattern_wins(self, module: str, format: str | None) -> None:
        assert self.CONFIG.named_format(module) == format
        assert self.CONFIG.format_of(f"{module}.weight", "bf16") == (format or "int4")

    def test_dots_are_literal(self) -> None:
        assert DeepSeekConfig(formats={"a.*.c": "int8"}).named_format("aXbXc") is None
        assert DeepSeekConfig(formats={"a.[bc]": "int8"}).named_format("a.b") is None, "only * is special"

    def test_entries_without_a_match(self) -> None:
        modules = ["model.layers.1.mlp.experts.down_proj", "lm_head"]
        config = DeepSeekConfig(formats={"lm_head": "int8", "*.experts.*": "int8", "*.expert.*": "int8", "head": "int8"})
        assert config.unmatched(modules) == ["*.expert.*", "head"]

    @pytest.mark.parametrize(
        ("fields", "format"),
        [({"precision": "int4"}, "int8"), ({"precision": "bf16"}, "bf16"), ({"precision": "int8"}, "int8"), ({}, "q4_1"),
         ({"precision": "int4", "formats": {"a": "int4"}}, "int4")],
    )  # fmt: skip
    def test_the_minimum_format_applies_only_to_precision(self, fields: dict[str, Any], format: str) -> None:
        assert DeepSeekConfig(**fields).format_of("a.weight", "q4_1", "int8") == format


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_context_extension_needs_a_length(kind):
    config = DeepSeekConfig(context_extension=kind, context_length=32768)
    assert DeepSeekConfig.from_dict(json.loads(config.to_json_string())) == config
    with pytest.raises(ConfigError, match=f"{kind}.*needs context_length"):
        DeepSeekConfig(context_extension=kind)
    with pytest.raises(ConfigError, match="context_length=32768 needs context_extension.*'yarn' or 'dynamic'"):
        DeepSeekConfig(context_length=32768)
