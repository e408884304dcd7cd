"""Checkpoints that cannot be loaded, recognized without loading them."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.doctor import examine
from deepseek_optimizer.doctor.checks import checkpoint


def test_valid_checkpoints(case, tiny_model, one):
    finding = one(checkpoint.check(case(model=str(tiny_model))), "ok", "all that the model needs")
    assert finding.facts["family"] == "llama" and finding.facts["stored_as"] == {"F32": finding.facts["tensors"]}


def cut(copy):
    file = copy.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES = {
    "truncated": cut,
    "no weights": lambda copy: (copy.path / "model.safetensors").unlink(),
    "a tensor less": lambda copy: copy.edit_weights(lambda w: w.pop("model.norm.weight")),
    "a tensor too many": lambda copy: copy.edit_weights(lambda w: w.update(extra=torch.ones(2))),
    "another shape": lambda copy: copy.edit("config.json", intermediate_size=160),
    "an unknown family": lambda copy: copy.edit("config.json", model_type="unknown"),
    "another quantizer": lambda copy: copy.edit("config.json", quantization_config={"quant_method": "hqq"}),
    "a tokenizer too large": lambda copy: copy.edit("config.json", vocab_size=100),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints(case, model_copy, one, damage):
    DAMAGES[damage](model_copy)
    findings = examine(case(model=str(model_copy.path)))
    one(findings, "error", "cannot be loaded")
    assert findings[-1].check == "checkpoint"  # a checkpoint that cannot be opened is not examined further


def test_missing_checkpoints(case, one, tmp_path):
    assert "nowhere" in one(checkpoint.check(case(model=str(tmp_path / "nowhere"))), "error", "cannot be loaded").cause


def test_tied_weights_may_be_stored_twice(case, model_copy, one):
    model_copy.edit_weights(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    one(checkpoint.check(case(model=str(model_copy.path))), "ok", "all that the model needs")


def test_gguf_conversions_are_named(case, one, tmp_path):
    from support.gguf_kquants import llama_file

    path = tmp_path / "model.gguf"
    path.write_bytes(llama_file({"": "Q4_K", "ffn_up": "IQ3_S"}))
    found = list(checkpoint.check(case(model=str(path))))
    assert [f.severity for f in found] == ["ok", "note"] and "IQ3_S" in found[1].what


def test_a_model_on_the_general_path_is_not_examined_further(case, model_copy, one):
    model_copy.edit("config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    finding = one(checkpoint.check(case(model=str(model_copy.path))), "note", "gpt2 takes the general path")
    assert "'gpt2' is not supported" in finding.cause and "dso info" in finding.fix
    assert examine(case(model=str(model_copy.path)))[-1].check == "checkpoint"
    model_copy.edit("config.json", model_type="bert", architectures=["BertModel"])
    one(checkpoint.check(case(model=str(model_copy.path))), "note", "bert is an encoder")
    assert examine(case(model=str(model_copy.path)))[-1].check == "checkpoint"
