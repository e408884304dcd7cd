"""`kl_budget`: formats chosen by measurement, preserved by saving, and rejected where they are impossible."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_optimizer import CheckpointError, ConfigError, DeepSeekConfig, DynamicGraphOptimizer, load_model, load_tokenizer
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.calibration.text import sample_text
from deepseek_optimizer.errors import KlBudgetError
from deepseek_optimizer.integration.load import kl_budget
from deepseek_optimizer.integration.load.calibrate import BUILT_IN, ENVIRONMENT
from deepseek_optimizer.integration.load.kl_budget import calibration_tokens, others, spread
from deepseek_optimizer.quant import get_format
from support.family_configs import llama
from support.models import CASES, random_model
from support.mtp_files import save_with_mtp

BACKENDS = ["reference"] + (["cpu"] if unavailable_reason() is None else [])
FAST = BACKENDS[-1]
SENSITIVE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory, byte_tokenizer):
    """A random model in which one matrix contributes most to the residual stream, so that its errors matter most."""
    config = CASES["llama-tied"]()
    config.vocab_size = len(byte_tokenizer)
    model = random_model(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(20 if name.startswith(SENSITIVE) else 0.1)
    folder = tmp_path_factory.mktemp("adapt") / "model"
    model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=BACKENDS)
def adapted(request, original):
    return load_model(original, kl_budget=0.03, backend=request.param), request.param


def kl_between(model, reference, tokens) -> float:
    terms = []
    with torch.inference_mode():
        for ids in tokens:
            p, q = (m(ids, use_cache=False).logits[0].double().log_softmax(-1) for m in (reference, model))
            terms.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(terms).mean().item()


def formats_of(model) -> dict[str, str]:
    return model.dso.manifest.formats()


def test_the_budget_holds_when_measured_independently(adapted, original):
    model, backend = adapted
    chosen = next(p for p in model.report().to_dict()["curve"] if p["chosen"])
    tokens = calibration_tokens(model.dso.config, load_tokenizer(original))
    assert [t.shape for t in tokens] == [(1, 128)] * 4
    measured = kl_between(model, load_model(original, backend=backend), tokens)
    assert measured == pytest.approx(chosen["measured_kl"], rel=1e-3)
    assert measured <= 0.03 < min(p["measured_kl"] for p in model.report().curve if p["bytes"] < chosen["bytes"])


def test_the_sensitive_matrix_gets_a_large_format(adapted):
    actual = formats_of(adapted[0])
    wide = {name for name, format in actual.items() if get_format(format).bits > 8}
    assert SENSITIVE in wide
    assert not any("layers.0" in name or "layers.2" in name for name in wide), (
        "insensitive matrices get smaller formats instead"
    )
    for layer in range(3):
        for together in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({actual[f"model.layers.{layer}.{name}"] for name in together}) == 1


def test_the_curve_is_monotonic(adapted):
    report = adapted[0].report()
    curve = report.to_dict()["curve"]
    assert len(curve) >= 4
    assert sum(point["chosen"] for point in curve) == 1
    for before, after in itertools.pairwise(curve):
        assert before["bytes"] < after["bytes"] and before["bits"] < after["bits"]
        assert before["measured_kl"] > after["measured_kl"]
    assert curve[0]["formats"] == {"int3": 22}
    chosen = next(point for point in curve if point["chosen"])
    assert chosen["bytes"] == sum(row.bytes for row in report.formats)
    assert chosen["formats"] == {row.format: row.matrices for row in report.formats}
    assert f"{chosen['bits']:.2f} bits (chosen)" in str(report)


def test_a_larger_budget_makes_a_smaller_model(adapted, original):
    model, backend = adapted
    larger = load_model(original, kl_budget=0.3, backend=backend)
    assert larger.report().bytes_after < model.report().bytes_after
    smallest = load_model(original, kl_budget=100, backend=backend)
    assert set(formats_of(smallest).values()) == {"int3"}


def test_chosen_formats_are_saved_and_loaded(adapted, tmp_path):
    model, backend = adapted
    ids = torch.arange(30)[None]
    model.save_pretrained(tmp_path / "packed")
    saved = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert saved["quantization_config"]["kl_budget"] == 0.03 and saved["quantization_config"]["formats"] is None
    assert {name: entry["format"] for name, entry in saved["packed_manifest"]["modules"].items()} == formats_of(model)
    for loaded in (
        load_model(tmp_path / "packed", backend=backend),
        load_model(tmp_path / "packed", DeepSeekConfig(backend=backend)),
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed"),
    ):
        assert formats_of(loaded) == formats_of(model)
        assert loaded.report().curve == model.report().curve
        assert loaded.dso.config.kl_budget == 0.03
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(CheckpointError, match="already packed.*convert the original"):
        load_model(tmp_path / "packed", kl_budget=0.01)
    with pytest.raises(CheckpointError, match="already packed"):
        load_model(tmp_path / "packed", formats={SENSITIVE: "int4"})
    load_model(tmp_path / "packed", kl_budget=0.03, formats=formats_of(model))


def test_from_pretrained_chooses_the_same(adapted, original):
    model, backend = adapted
    config = DeepSeekConfig(kl_budget=0.03, backend=backend)
    other = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    assert formats_of(other) == formats_of(model)
    assert other.dso.config == config, "the chosen formats are in the manifest, not in the settings"
    assert torch.equal(other(torch.arange(30)[None]).logits, model(torch.arange(30)[None]).logits)
    assert other.get_input_embeddings().weight is other.get_output_embeddings().weight
    assert config == DeepSeekConfig(kl_budget=0.03, backend=backend), "the user's config is not modified"


def test_explicit_formats_are_kept(adapted, original):
    _, backend = adapted
    named = {"model.embed_tokens": "bf16", "model.layers.0.self_attn.q_proj": "int8"}
    actual = formats_of(load_model(original, kl_budget=0.3, formats=named, backend=backend))
    assert {name: actual[name] for name in named} == named
    again = load_model(original, kl_budget=0.3, formats=actual, backend=backend)
    assert formats_of(again) == actual
    with pytest.raises(KlBudgetError, match="smallest KL divergence that can be reached is"):
        load_model(original, kl_budget=1e-4, formats={SENSITIVE: "int4"}, backend=backend)


def test_a_cache_that_costs_more_than_the_budget(original):
    with pytest.raises(KlBudgetError, match="kl_budget=1e-06") as caught:
        load_model(original, kl_budget=1e-6, kv_cache="int8", backend=FAST)
    reached = caught.value.reached
    assert reached > 1e-6
    model = load_model(original, kl_budget=2 * reached, kv_cache="int8", backend=FAST)
    assert next(p for p in model.report().curve if p["chosen"])["measured_kl"] <= 2 * reached


def test_a_budget_of_zero_is_always_possible(original):
    model = load_model(original, kl_budget=1e-15, backend=FAST)
    assert set(formats_of(model).values()) == {"fp32"}


def test_explicit_formats(original):
    model = load_model(original, precision="int4", formats={SENSITIVE: "int8"}, backend=FAST)
    assert [name for name, format in formats_of(model).items() if format != "int4"] == [SENSITIVE]
    with pytest.raises(ConfigError, match="'model.layers.1.mlp.down'.*did you mean 'model.layers.1.mlp.down_proj'"):
        load_model(original, formats={"model.layers.1.mlp.down": "int8"}, backend=FAST)


def test_a_calibration_text_is_used(original, tmp_path):
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("too short")
    long.write_text("0123456789 " * 200)
    with pytest.raises(ConfigError, match="calibration: .*short.txt has 9 tokens"):
        load_model(original, kl_budget=0.1, calibration=str(short), backend=FAST)
    model = load_model(original, kl_budget=0.1, calibration=str(long), backend=FAST)
    tokens = calibration_tokens(model.dso.config, load_tokenizer(original))
    assert len(tokens) == 17 and [t.tolist() for t in spread(tokens)] == [tokens[i].tolist() for i in (0, 4, 8, 12)]
    chosen = next(p for p in model.report().curve if p["chosen"])
    measured = kl_between(model, load_model(original, backend=FAST), spread(tokens))
    assert measured == pytest.approx(chosen["measured_kl"], rel=1e-3) and measured <= 0.1
    rounding = model.dso.manifest.rounding
    assert (rounding["method"], rounding["text"]) == ("compensated", str(long))
    assert rounding["tokens"] == 13 * 128, "the KL divergence is measured on the others"
    assert len(others(tokens)) == 13 and not set(map(id, others(tokens))) & set(map(id, spread(tokens)))
    plain = load_model(original, formats=formats_of(model), backend=FAST)
    assert measured < 0.8 * kl_between(plain, load_model(original, backend=FAST), spread(tokens))


def test_the_budget_is_used_by_compensated_rounding(original, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(sample_text()[:6000], encoding="utf-8")
    plain = load_model(original, kl_budget=0.1, backend=FAST)
    model = load_model(original, kl_budget=0.1, calibration=str(text), backend=FAST)
    chosen = next(p for p in model.report().to_dict()["curve"] if p["chosen"])
    assert 0.05 < chosen["measured_kl"] <= 0.1
    assert model.report().bytes_after < plain.report().bytes_after
    assert chosen["bytes"] == sum(row.bytes for row in model.report().formats)


def test_matrices_that_were_rounded_alone_are_described(original, tmp_path, monkeypatch):
    monkeypatch.setattr(kl_budget, "COMPENSATIONS", 0)  # no choice is rounded as a whole
    text = tmp_path / "text.txt"
    text.write_text(sample_text()[:6000], encoding="utf-8")
    model = load_model(original, kl_budget=0.1, calibration=str(text), backend=FAST)
    small = [name for name, format in formats_of(model).items() if get_format(format).bits < 6]
    rounding = model.dso.manifest.rounding
    assert len(small) > 3 and (rounding["matrices"], rounding["plain"]) == (len(small), {})


def test_the_built_in_text(original, monkeypatch):
    asked = {"kl_budget": 0.3, "calibration": "auto", "backend": FAST}
    assert not load_model(original, **asked).dso.manifest.rounding, "the tests switch it off"
    monkeypatch.delenv(ENVIRONMENT)
    monkeypatch.setattr(kl_budget, "BUILT_IN_STRETCHES", 12)
    rounding = load_model(original, **asked).dso.manifest.rounding
    assert (rounding["text"], rounding["tokens"]) == (BUILT_IN, 8 * 128)


@pytest.mark.parametrize("calibration", [None, "text"])
@pytest.mark.parametrize("vocabulary", [None, 30], ids=["all tokens", "some tokens"])
def test_mtp_layers_get_the_format_of_most_weights(calibration, vocabulary, byte_tokenizer, tmp_path):
    config = llama(num_nextn_predict_layers=1, tie_word_embeddings=True, draft_vocab_size=vocabulary)
    config.vocab_size = len(byte_tokenizer)
    save_with_mtp(tmp_path / "model", config)
    byte_tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(sample_text()[:6000], encoding="utf-8")
    model = load_model(tmp_path / "model", kl_budget=100, calibration=calibration and str(text), backend=FAST)
    formats = formats_of(model)
    drafting = {name for name in formats if name.startswith(f"model.layers.{config.num_hidden_layers}.")}
    assert len(drafting) > 5 and set(formats.values()) == {"int3"}
    chosen = next(p for p in model.report().curve if p["chosen"])
    assert sum(chosen["formats"].values()) == len(formats) - len(drafting), "they do not count in the size"
    ids = torch.arange(20)[None]
    drafted = model.generate(ids, max_new_tokens=8, do_sample=False, use_mtp=True)
    assert torch.equal(drafted, model.generate(ids, max_new_tokens=8, do_sample=False))


def test_a_context_shorter_than_an_excerpt(original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "short")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "max_position_embeddings": 48}))
    for model in (
        load_model(folder, kl_budget=0.3, backend=FAST),
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=DeepSeekConfig(kl_budget=0.3, backend=FAST)),
    ):
        assert model.report().curve


def test_a_loaded_model_has_no_tokenizer(original):
    model = AutoModelForCausalLM.from_pretrained(original)
    with pytest.raises(ConfigError, match="kl_budget needs .* load_model or `dso convert`"):
        DynamicGraphOptimizer(model, config=DeepSeekConfig(kl_budget=0.1))


def test_rules_of_a_model_with_adapters_can_be_changed(adapted):
    model, _ = adapted
    before = formats_of(model)
    ids = torch.arange(30)[None]
    logits = model(ids).logits
    again = DynamicGraphOptimizer(model, config=model.dso.config).optimize()
    assert formats_of(again) == before and torch.equal(again(ids).logits, logits)
