"""Garbage output: every cause, provoked."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_optimizer import load_model
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.doctor import examine_symptom
from deepseek_optimizer.doctor.symptoms import garbage


def test_untrained_weights_predict_at_chance(case, tiny_model, one):
    actual = list(garbage.measure(case(model=str(tiny_model))))
    finding = one(actual, "error", "no better than chance")
    assert finding.facts["loss"] == pytest.approx(finding.facts["chance_loss"], rel=0.1)
    one(actual, "ok", "kernels agree with plain torch")


@pytest.fixture(scope="module")
def english(tmp_path_factory, byte_tokenizer):
    """A model that predicts the letters of the doctor's paragraph: its head has the statistics of letter pairs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = byte_tokenizer(garbage.TEXT)["input_ids"]
    size = len(byte_tokenizer)
    counts = torch.full((size, size), 0.01)
    for a, b in zip(ids, ids[1:], strict=False):
        counts[a, b] += 1
    width = 320  # wide enough for one direction per token
    config = LlamaConfig(
        hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=5, num_key_value_heads=1,
        vocab_size=size, max_position_embeddings=1024, eos_token_id=byte_tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=byte_tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, width))
        scale = math.sqrt(width)  # the length of a unit vector after the final norm
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :size] = (counts / counts.sum(1, keepdim=True)).log().T / scale
    folder = tmp_path_factory.mktemp("english") / "model"
    model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_predicts_text(case, english, one):
    actual = list(garbage.measure(case(model=str(english))))
    assert one(actual, "ok", "predicts plain English").facts["perplexity"] < 20
    assert [f.severity for f in actual] == ["ok", "ok"]


def test_the_tokenizer_of_another_model(case, english, one, tmp_path):
    """The same letters with other token ids."""
    path = tmp_path / "mixed"
    shutil.copytree(english, path)
    content = json.loads((path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: (i + 77) % len(vocabulary) for token, i in vocabulary.items()}
    (path / "tokenizer.json").write_text(json.dumps(content))
    one(garbage.measure(case(model=str(path))), "error", "no better than chance")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_nan_weights(case, model_copy, one, name):
    model_copy.edit_weights(lambda w: w[name].view(-1)[3:4].fill_(math.nan))
    actual = list(garbage.measure(case(model=str(model_copy.path))))
    assert one(actual, "error", "is damaged").facts["tensor"] == name and len(actual) == 1


def test_nan_logits(case, model_copy, one):
    """Finite weights whose products overflow, so that the logits are NaN."""

    def overflow(weights):
        weights["model.norm.weight"].fill_(3e38)
        weights["model.embed_tokens.weight"].mul_(1e3)

    model_copy.edit_weights(overflow)
    actual = list(garbage.measure(case(model=str(model_copy.path))))
    one(actual, "error", "logits are not finite")
    assert len(actual) == 1


@pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")
def test_kernels_with_wrong_results(case, tiny_model, one, monkeypatch):
    """Simulates a fault: the native backend's logits multiplied by fifty."""
    true = garbage._logits

    def wrong(model, ids):
        return true(model, ids) * (50 if model.dso.backend.name == "cpu" else 1)

    monkeypatch.setattr(garbage, "_logits", wrong)
    one(garbage.measure(case(model=str(tiny_model))), "error", "disagree with plain torch")


def test_kernels_that_give_nan_do_not_pass(case):
    assert garbage.judge_kernels(math.nan, case()).severity == "error"


def test_too_coarse_quantization(case, english, one, tmp_path):
    """Outliers in every group of 32, so that four bits represent nothing else."""
    path = tmp_path / "outliers"
    shutil.copytree(english, path)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][:, 31::32] -= 60.0
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    actual = list(garbage.measure(case(model=str(path), fields={"precision": "int4"})))
    assert one(actual, "error", "int4 changes the model's predictions").facts["kl_to_stored"] > garbage.QUANTIZED_KL


@pytest.mark.parametrize(("kl", "severity"), [(0.01, "ok"), (0.4, "note"), (1.5, "error"), (math.nan, "error")])
def test_the_loss_from_quantization(kl, severity):
    assert garbage.judge_quantization(kl, "int4").severity == severity


def test_the_stored_weights_do_not_fit(case, machine, english, one):
    box = machine(available_bytes=100_000)
    one(garbage.measure(case(model=str(english), machine=box, fields={"precision": "int4"})), "note", "cannot be measured here")


def test_a_packed_checkpoint(case, english, one, tmp_path, byte_tokenizer):
    load_model(english, precision="int8").save_pretrained(tmp_path / "packed")
    byte_tokenizer.save_pretrained(tmp_path / "packed")
    actual = list(garbage.measure(case(model=str(tmp_path / "packed"))))
    one(actual, "note", "the original weights are not available")
    one(actual, "ok", "predicts plain English")


def test_no_chat_template_is_part_of_the_answer(case, model_copy, one):
    (model_copy.path / "chat_template.jinja").unlink(missing_ok=True)
    model_copy.edit("tokenizer_config.json", chat_template=None)
    one(examine_symptom(case(model=str(model_copy.path)), "garbage"), "warning", "no chat template")
