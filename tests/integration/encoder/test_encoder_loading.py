"""Encoders from checkpoints: float and packed, in any class, with settings, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from deepseek_optimizer import (
    ConfigError,
    DeepSeekConfig,
    DynamicGraphOptimizer,
    UnsupportedModelError,
    load_model,
    make_engine,
    report,
)
from support.encoders import CASES, padded, random_encoder, random_sentences

CALL = padded(random_sentences(4, 11))


def outputs(model):
    with torch.no_grad():
        return model(**CALL)[0]


@pytest.mark.parametrize("case", CASES)
def test_load_save_and_load_again(tmp_path, case):
    plain = random_encoder(case, "ForMaskedLM")
    plain.save_pretrained(tmp_path / "float")
    fast = load_model(tmp_path / "float", precision="int8")
    made = fast.report()
    assert type(fast) is type(plain) and made.path == "plan" and made.layers > 0 and made.ops["encoder_attention"] > 1
    assert "encoder_attention" in str(made) and made.to_dict()["path"] == "plan"
    fast.save_pretrained(tmp_path / "packed")
    again = load_model(tmp_path / "packed")
    assert again.dso.mappings and torch.equal(outputs(again), outputs(fast))
    inner = AutoModel.from_pretrained(tmp_path / "packed")
    assert report(inner).path == "plan" and torch.equal(outputs(inner), outputs(fast.base_model))
    assert not again.dso.notes


def test_from_pretrained_and_in_place(tmp_path):
    plain = random_encoder("bert", "ForSequenceClassification")
    plain.save_pretrained(tmp_path)
    config = DeepSeekConfig(precision="int8", strict=True)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
    packed = DynamicGraphOptimizer(plain, config=config).optimize()
    assert torch.equal(outputs(loaded), outputs(packed))
    assert report(packed).ops == report(loaded).ops
    masked = AutoModelForMaskedLM.from_pretrained(tmp_path, quantization_config=config)
    assert report(masked).path == "plan"


def test_rules_and_formats(tmp_path):
    random_encoder("bert").save_pretrained(tmp_path)
    plain = load_model(tmp_path, precision="fp32", fusion_rules=())
    fused = load_model(tmp_path, precision="fp32", formats={"encoder.layer.0.*": "int8"}, strict=True)
    assert plain.report().rules == {} and fused.report().rules == {"qkv": 3}
    assert plain.report().ops["linear"] == fused.report().ops["linear"] + 6
    assert {row.format for row in fused.report().formats} == {"fp32", "int8"}


def test_features_without_a_plan(tmp_path):
    random_encoder("bert", hidden_act="relu").save_pretrained(tmp_path)
    model = load_model(tmp_path, precision="fp32")
    assert model.report().path == "general" and "hidden_act 'relu'" in model.report().reason
    for load in (
        load_model,
        lambda path, strict: AutoModel.from_pretrained(path, quantization_config=DeepSeekConfig(strict=strict)),
    ):
        with pytest.raises(UnsupportedModelError, match="hidden_act 'relu' is not supported"):
            load(tmp_path, strict=True)
    random_encoder("bert", "LMHeadModel", is_decoder=True).save_pretrained(tmp_path / "decoder")
    model = load_model(tmp_path / "decoder", precision="fp32")
    assert model.report().path == "general" and "is_decoder" in model.report().reason


def test_settings_of_decoders(tmp_path):
    random_encoder("bert").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="kv_cache='int8' needs an execution plan for decoding.*bert is an encoder"):
        load_model(tmp_path, kv_cache="int8")
    with pytest.raises(UnsupportedModelError, match="BertModel .*bert is an encoder, whose plan computes hidden states"):
        make_engine(load_model(tmp_path))
