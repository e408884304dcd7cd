"""`dso draft`: a layer is trained for a frozen model, which then generates the same text in fewer steps."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from deepseek_optimizer import load_model
from support.quantized_files import SECTIONS, gptq, quantized_copy


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Chats with regular answers, which a layer learns to draft in a few steps."""
    file = tmp_path_factory.mktemp("draft") / "chats.jsonl"
    turns = [[{"role": "user", "content": f"count {i}"}, {"role": "assistant", "content": "one two " * 6}] for i in range(40)]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))
    return file


@pytest.fixture
def draft(dso, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda *flags, model=tiny_model: dso("draft", model, "--output", tmp_path / "out", *flags)


FAST = ("--steps", "40", "--lr", "1e-2", "--max-length", "64", "--too-long", "split", "--eval-fraction", "0.1", "--all-tokens")


def test_a_layer_is_trained_that_drafts_the_same_text(draft, chats, tiny_model, tmp_path):
    result = draft("--data", chats, *FAST, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["kind"] == "model" and facts["loads"] and facts["eval_after"] < facts["eval_before"]
    assert facts["accepted"] > 0.5
    out = tmp_path / "out"
    before, after = load_file(tiny_model / "model.safetensors"), load_file(out / "model.safetensors")
    layer = f"model.layers.{json.loads((out / 'config.json').read_text())['num_hidden_layers']}."
    assert all(torch.equal(after[name], tensor.to(after[name].dtype)) for name, tensor in before.items() if name in after)
    assert before.keys() - after.keys() <= {"lm_head.weight"} and all(name.startswith(layer) for name in after.keys() - before)
    model, tokenizer = load_model(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer("count 3", return_tensors="pt")["input_ids"]
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
    assert torch.equal(model.generate(ids, use_mtp=True, **options), model.generate(ids, **options))


def test_a_draft_vocabulary(draft, chats, tmp_path):
    facts = json.loads(draft("--data", chats, *FAST, "--draft-vocabulary", 40, "--json").stdout)
    assert facts["accepted"] > 0.5
    model, tokenizer = load_model(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(model.dso.draft_vocabularies[0].tokens) == 40
    ids = tokenizer("count 3", return_tensors="pt")["input_ids"]
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
    fixed = {"use_mtp": True, "num_assistant_tokens_schedule": "constant"}
    assert torch.equal(model.generate(ids, **fixed, **options), model.generate(ids, **options))
    assert model.dso.speculation.accepted_length > 1


def test_the_plan_counts_the_layer_only(draft, chats):
    planned = json.loads(draft("--data", chats, *FAST, "--dry-run", "--json").stdout)
    assert 0 < planned["trained"] < planned["weights"]


def test_quantized_models_are_refused(draft, chats, tiny_model, tmp_path):
    folder, _ = quantized_copy(tiny_model, tmp_path / "gptq", gptq, SECTIONS["gptq"])
    result = draft("--data", chats, *FAST, model=folder)
    assert result.exit_code == 2
    assert "are quantized; train the layer that drafts on the original model, then convert the result" in result.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--set", "draft_steps=2"), "--set draft_steps=2: draft_steps is already set to 3"),
        (("--set", "mtp_loss_weight=0.3"), "draft_steps=3 trains multi-token prediction layers for the model as it is"),
        (("--set", "fused_loss=false"), "draft_steps=3 needs the fused loss"),
    ],
)
def test_contradictions_are_refused(draft, chats, flags, message):
    result = draft("--data", chats, *FAST, *flags)
    assert result.exit_code == 2 and message in result.stderr
