"""DynamicGraphOptimizer and the report."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch

from deepseek_optimizer import ConfigError, DeepSeekConfig, DynamicGraphOptimizer, UnsupportedModelError, report
from deepseek_optimizer.config import FUSION_RULES
from support.models import CASES, assert_close_rows, random_ids, random_model


def optimize(model, **options):
    options.setdefault("config", DeepSeekConfig(backend="reference"))
    return DynamicGraphOptimizer(model, **options).optimize()


@pytest.fixture
def model():
    return random_model(CASES["llama-tied"]())


@torch.no_grad()
def test_optimizing_in_place_preserves_the_logits(model):
    ids = torch.tensor([random_ids(model.config, 40)])
    expected = model(ids).logits
    assert optimize(model) is model
    assert_close_rows(model(ids).logits, expected)


@pytest.mark.parametrize("rules", [[], *[[r] for r in FUSION_RULES], ["attention_softmax", "layer_norm"], None])
@torch.no_grad()
def test_any_choice_of_rules_gives_the_same_logits(model, rules):
    ids = torch.tensor([random_ids(model.config, 40)])
    expected = model(ids).logits
    optimize(model, fusion_rules=rules)
    assert_close_rows(model(ids).logits, expected)
    assert {r.rule for r in report(model).rules} == set(FUSION_RULES if rules is None else rules)


@pytest.mark.parametrize(("dtype", "format"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_without_a_config_the_weights_keep_their_dtype(dtype, format):
    model = random_model(CASES["llama-gqa"](), dtype=dtype)
    DynamicGraphOptimizer(model).optimize()
    assert [f.format for f in report(model).formats] == [format]
    assert model.dtype == dtype


def test_originals_are_freed_one_by_one(model, monkeypatch):
    """When a matrix is packed, all earlier ones have been freed: the peak is the model and one matrix."""
    from deepseek_optimizer.backends.reference import ReferenceBackend
    from deepseek_optimizer.quant import reference_packer

    alive, peak = [], []

    def packer(backend, weight, name, out=None):
        peak.append(sum(ref() is not None for ref in alive))
        return reference_packer(weight, name, out)

    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and not any(ref() is module.weight for ref in alive):
            alive.append(weakref.ref(module.weight))
    total = len(alive)
    monkeypatch.setattr(ReferenceBackend, "pack", packer)
    optimize(model)
    gc.collect()
    assert all(ref() is None for ref in alive)
    # The head holds the tied table until it is replaced too; nothing else remains.
    assert all(left <= total - i + 1 for i, left in enumerate(peak))


def test_bytes_before_and_after(model):
    before = sum(p.numel() * 4 for p in model.parameters())
    optimize(model, config=DeepSeekConfig(backend="reference", precision="int4"))
    made = report(model)
    assert made.bytes_before == before
    assert made.bytes_after == sum(p.numel() * p.element_size() for p in model.parameters())
    assert made.bytes_after < 0.3 * before


def test_optimizing_again_changes_rules_only(model):
    optimize(model, config=DeepSeekConfig(backend="reference", precision="int8"))
    weight = model.lm_head.weight
    before = report(model).bytes_before
    optimize(model, fusion_rules=["qkv"])
    assert model.lm_head.weight is weight
    assert [r.rule for r in report(model).rules] == ["qkv"]
    assert report(model).bytes_before == before
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 211)


def test_batch_size_range_sizes_buffers_and_warms(model, monkeypatch):
    from deepseek_optimizer.backends.reference.plan import ReferencePlan

    reserved, rows = [], []
    monkeypatch.setattr(ReferencePlan, "reserve", lambda self, t, r: reserved.append((t, r)))
    run = ReferencePlan.run
    monkeypatch.setattr(ReferencePlan, "run", lambda self, b, s: (rows.append(len(b.query_len)), run(self, b, s))[1])
    optimize(model, batch_size_range=(4, 32))
    assert reserved == [(512, 32)]
    assert rows == [4, 32]


def test_report_as_table_and_dict(model):
    optimize(model, fusion_rules=["attention_softmax", "layer_norm"])
    made = report(model)
    text = str(made)
    for word in (
        "llama",
        "reference",
        "attention_softmax",
        "layer_norm",
        "applied 3 times",
        "rules left out",
        "qkv",
        "fp32",
        "->",
    ):
        assert word in text
    as_dict = json.loads(json.dumps(made.to_dict()))
    assert as_dict["backend"] == "reference"
    assert as_dict["rules"][0]["places"]
    assert len(as_dict["kernels"]) == len(model.dso.plan.describe())
    assert as_dict["config"]["fusion_rules"] == ["attention_softmax", "layer_norm"]
    again = model.report().to_dict()
    assert {name for name in as_dict if json.loads(json.dumps(again))[name] != as_dict[name]} <= {"kv_limit", "kv_limit_why"}


def test_a_missing_native_build_is_reported(model, monkeypatch):
    import deepseek_optimizer.backends.cpu as cpu
    from deepseek_optimizer.integration.bind.runtime import OptimizerWarning

    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "it was not built")
    with pytest.warns(OptimizerWarning, match="using the reference backend, .*it was not built"):
        optimize(model, config=DeepSeekConfig())
    assert "it was not built" in str(report(model))


def test_an_unavailable_backend_is_an_error(model, monkeypatch):
    from deepseek_optimizer import BackendError
    from deepseek_optimizer.backends.cpu import native

    def missing():
        raise BackendError("the native CPU library was not built")

    monkeypatch.setattr(native, "library", missing)
    native._shared_context.cache_clear()
    with pytest.raises(BackendError, match="not built"):
        optimize(model, config=DeepSeekConfig(backend="cpu", threads=3))
    assert isinstance(model.lm_head, torch.nn.Linear) and model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fusion_rules": ["layernorm"]}, ConfigError, "layer_norm"),
        ({"batch_size_range": (4, 2)}, ConfigError, "batch_size_range"),
        ({"batch_size_range": 4}, ConfigError, "batch_size_range"),
    ],
)
def test_invalid_arguments_at_construction(model, options, error, message):
    with pytest.raises(error, match=message):
        DynamicGraphOptimizer(model, **options)


def test_unsupported_models(model):
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    with pytest.raises(UnsupportedModelError, match="gpt2.*llama"):
        DynamicGraphOptimizer(gpt2, config=DeepSeekConfig(strict=True))
    with pytest.raises(ConfigError, match="expected a Transformers model"):
        DynamicGraphOptimizer(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="not an optimized model"):
        report(model)


def test_models_without_a_dtype_or_weights_to_pack(model):
    with pytest.raises(ConfigError, match="float64.*model.float"):
        DynamicGraphOptimizer(model.double())
    with pytest.raises(ConfigError, match="meta device"):
        DynamicGraphOptimizer(model.float().to("meta"))
    with pytest.raises(ConfigError, match="must be a DeepSeekConfig or None, got dict"):
        DynamicGraphOptimizer(model, config={"precision": "int8"})
