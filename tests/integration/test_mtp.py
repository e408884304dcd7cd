"""MTP layers: loaded in every way, saved with the model, and `generate(use_mtp=True)`."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepseek_optimizer import CheckpointError, DeepSeekConfig, DynamicGraphOptimizer, load_model
from deepseek_optimizer.errors import UnsupportedRequestError
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.integration.generation import speculation
from support.family_configs import deepseek_v3, deepseek_v32, llama, qwen3
from support.models import random_ids
from support.mtp_files import save_with_mtp
from support.tiny_v3 import documents, tiny_v3

from .generation.test_speculation import Always

CONFIGS = {
    "one": lambda: deepseek_v3(num_nextn_predict_layers=1),
    "two": lambda: deepseek_v3(num_nextn_predict_layers=2),
    "all-dense-main": lambda: deepseek_v3(first_k_dense_replace=3),
    "v32": lambda: deepseek_v32(num_nextn_predict_layers=1),
    "llama": lambda: llama(num_nextn_predict_layers=1, tie_word_embeddings=True),
    "qwen3": lambda: qwen3(num_nextn_predict_layers=2),
    "llama-drafting-some-tokens": lambda: llama(num_nextn_predict_layers=1, tie_word_embeddings=True, draft_vocab_size=50),
    "v3-drafting-some-tokens": lambda: deepseek_v3(num_nextn_predict_layers=2, draft_vocab_size=40),
}


def by_load_model(folder: Path, **fields: Any) -> Any:
    return load_model(folder, **{"backend": "reference", **fields})


def by_from_pretrained(folder: Path, **fields: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=DeepSeekConfig(**{"backend": "reference", **fields})
    )


ways = pytest.mark.parametrize("load", [by_load_model, by_from_pretrained])


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory) -> Path:
    """Read-only."""
    path = tmp_path_factory.mktemp("mtp") / request.param
    save_with_mtp(path, CONFIGS[request.param]())
    return path


@pytest.fixture
def one(tmp_path) -> Path:
    """May be modified."""
    save_with_mtp(tmp_path / "one", deepseek_v3())
    return tmp_path / "one"


def assert_same_weights(a: Any, b: Any) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@ways
def test_layers_are_loaded_and_share_repeated_tensors(folder, load, caplog):
    with caplog.at_level(logging.WARNING):
        model = load(folder)
    assert not [r for r in caplog.records if "UNEXPECTED" in r.getMessage() or "MISSING" in r.getMessage()]
    config, stored = model.config, load_file(folder / "model.safetensors")
    layers = config.num_nextn_predict_layers
    assert len(model.model.layers) == config.num_hidden_layers + layers
    assert len(model.dso.mtp_plans) == layers
    assert model.dso.graph.cache.layers == config.num_hidden_layers + layers
    state = model.state_dict()
    for depth in range(layers):
        prefix = f"model.layers.{config.num_hidden_layers + depth}"
        assert torch.equal(state[f"{prefix}.enorm.weight"], stored[f"{prefix}.enorm.weight"])
        if "deepseek" in config.model_type:
            router = model.get_submodule(prefix).mlp.gate
            assert router.weight.dtype == router.e_score_correction_bias.dtype == torch.float32
            assert torch.equal(router.weight, stored[f"{prefix}.mlp.gate.weight"])
        assert f"{prefix}.embed_tokens.weight" not in state
        vocabulary = model.dso.draft_vocabularies[depth]
        if f"{prefix}.shared_head.tokens" not in stored:
            assert vocabulary is None and f"{prefix}.shared_head.head.weight" not in state
        else:
            assert vocabulary.tokens.tolist() == stored[f"{prefix}.shared_head.tokens"].tolist()
            assert model.get_submodule(prefix).shared_head.head.out_features == config.draft_vocab_size


@pytest.mark.parametrize("precision", ["auto", "int4"])
def test_both_ways_load_the_same(folder, precision):
    assert_same_weights(by_load_model(folder, precision=precision), by_from_pretrained(folder, precision=precision))


@ways
def test_the_main_model_is_unchanged(folder, load):
    """Its logits, by the plan and by Transformers' forward, do not depend on the MTP layers."""
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    ids = torch.tensor([random_ids(plain.config, 20)])
    with torch.no_grad():
        expected = plain(ids, use_cache=False).logits
        model = load(folder)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-3, rtol=1e-3)
        with pytest.warns(UserWarning, match="output_attentions"):
            inner = model(ids, output_attentions=True, use_cache=False).logits
    torch.testing.assert_close(inner, expected, atol=1e-3, rtol=1e-3)


@ways
def test_own_embedding_and_head_are_kept(one, load):
    stored = load_file(one / "model.safetensors")
    for name in ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"):
        stored[name] = stored[name] * 1.01
    save_file(stored, one / "model.safetensors", {"format": "pt"})
    model = load(one)
    state = model.state_dict()
    assert "model.layers.3.embed_tokens.weight" in state
    assert "model.layers.3.shared_head.head.weight" in state
    ids = torch.tensor([random_ids(model.config, 20)])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, use_mtp=True, **options), model.generate(ids, **options))


@ways
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tokens: tokens.flip(0), r"layers\.3\.shared_head\.tokens': must be ascending token ids below 211"),
        (lambda tokens: tokens + 200, "must be ascending token ids below 211"),
        (lambda tokens: tokens[1:], r"has shape \(39,\), but the config requires \(40,\)"),
        (lambda tokens: None, r"lacks model\.layers\.3\.shared_head\.tokens"),
    ],
    ids=["descending", "too large", "too few", "none"],
)
def test_a_draft_vocabulary_is_checked(tmp_path, load, change, message):
    save_with_mtp(tmp_path / "some", deepseek_v3(draft_vocab_size=40))
    stored = load_file(tmp_path / "some" / "model.safetensors")
    name = "model.layers.3.shared_head.tokens"
    tokens = change(stored.pop(name))
    stored |= {} if tokens is None else {name: tokens.contiguous()}
    save_file(stored, tmp_path / "some" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "some")


@ways
def test_a_head_of_a_draft_vocabulary_is_not_the_models(tmp_path, load):
    save_with_mtp(tmp_path / "some", deepseek_v3(draft_vocab_size=40))
    stored = load_file(tmp_path / "some" / "model.safetensors")
    del stored["model.layers.3.shared_head.head.weight"]
    save_file(stored, tmp_path / "some" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.3\.shared_head\.head\.weight"):
        load(tmp_path / "some")


@ways
def test_a_missing_embedding_and_head_are_the_models(tmp_path, load):
    save_with_mtp(tmp_path / "apart", deepseek_v3(), repeated=False)
    save_with_mtp(tmp_path / "repeated", deepseek_v3())
    assert_same_weights(load(tmp_path / "apart"), load(tmp_path / "repeated"))


@pytest.mark.parametrize("precision", ["int4", "auto"])
def test_packed_checkpoints_round_trip(folder, tmp_path, precision):
    model = by_load_model(folder, precision=precision)
    model.save_pretrained(tmp_path / "packed")
    layer = f"model.layers.{model.config.num_hidden_layers}"
    section = json.loads((tmp_path / "packed" / "config.json").read_text())["packed_manifest"]
    assert f"{layer}.eh_proj" in section["modules"]
    for load in (by_load_model, by_from_pretrained):
        again = load(tmp_path / "packed")
        assert_same_weights(again, model)
        assert len(again.dso.mtp_plans) == model.config.num_nextn_predict_layers
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "packed" / "model.safetensors").read_bytes()


def test_file_conversion_includes_them(folder, tmp_path):
    from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint

    pack_checkpoint(folder, tmp_path / "converted", {"precision": "int4", "backend": "reference"})
    assert_same_weights(by_load_model(tmp_path / "converted"), by_load_model(folder, precision="int4"))


@ways
def test_disabled(folder, load, caplog):
    with caplog.at_level(logging.WARNING):
        model = load(folder, mtp="off")
    assert not [r for r in caplog.records if "UNEXPECTED" in r.getMessage()]
    assert len(model.model.layers) == model.config.num_hidden_layers == model.dso.graph.cache.layers
    with pytest.raises(UnsupportedRequestError, match='mtp="auto"'):
        model.generate(torch.tensor([[1, 2]]), use_mtp=True, max_new_tokens=3)


def test_a_checkpoint_without_them(tmp_path):
    from support.models import random_model

    random_model(deepseek_v3()).save_pretrained(tmp_path / "none")
    model = by_load_model(tmp_path / "none")
    with pytest.raises(UnsupportedRequestError, match="checkpoint contains no MTP layers"):
        model.generate(torch.tensor([[1, 2]]), use_mtp=True, max_new_tokens=3)


def test_a_model_converted_in_memory(folder):
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model = DynamicGraphOptimizer(plain, config=DeepSeekConfig(backend="reference")).optimize()
    with pytest.raises(UnsupportedRequestError, match="converted in memory"):
        model.generate(torch.tensor([[1, 2]]), use_mtp=True, max_new_tokens=3)


@ways
def test_an_incomplete_layer_is_an_error(one, load):
    stored = load_file(one / "model.safetensors")
    del stored["model.layers.3.eh_proj.weight"]
    save_file(stored, one / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.eh_proj\.weight"):
        load(one)


@pytest.mark.parametrize("lengths", [(9,), (40, 4, 31)], ids=["one", "left-padded"])
@pytest.mark.parametrize("drafts", [1, 3])
def test_greedy_text_equals_plain_decoding(folder, lengths, drafts, monkeypatch):
    monkeypatch.setattr(speculation, "DraftLengthController", Always)
    model = by_load_model(folder, prefill_chunk=16)
    rows = [torch.tensor(random_ids(model.config, n, i)) for i, n in enumerate(lengths)]
    ids = torch.stack([torch.nn.functional.pad(r, (max(lengths) - len(r), 0)) for r in rows])
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]).long()
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(ids, **options)
    assert torch.equal(plain, model.generate(ids, use_mtp=True, num_assistant_tokens=drafts, **options))
    assert all(n == drafts for outcomes in model.dso.speculation[:1] for n, _ in outcomes)


def test_a_copy_drafts_independently(folder):
    model = by_load_model(folder)
    ids = torch.tensor([random_ids(model.config, 9)])
    expected = model.generate(ids, use_mtp=True, max_new_tokens=5, do_sample=False)
    assert torch.equal(copy.deepcopy(model).generate(ids, use_mtp=True, max_new_tokens=5, do_sample=False), expected)


def test_with_an_adapter_there_are_no_drafts(one):
    """The adapter is on the MTP layer too, which no forward of Transformers runs."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(by_load_model(one), peft.LoraConfig(r=2, target_modules=["kv_b_proj"], init_lora_weights=False))
    options = {"input_ids": torch.tensor([[1, 2, 3]]), "max_new_tokens": 5, "do_sample": False}
    with pytest.warns(OptimizerWarning, match="without drafts"):
        text = model.generate(**options, use_mtp=True)
    assert torch.equal(text, model.generate(**options))


# ---- the trained model


@pytest.fixture(scope="module")
def trained() -> Any:
    return load_model(tiny_v3())


def prompts(count: int, length: int) -> torch.Tensor:
    return torch.tensor(documents(tiny_v3(), count, length))


FIXED = {"use_mtp": True, "num_assistant_tokens_schedule": "constant"}  # always the same number of drafts


def test_trained_drafts_have_the_acceptance_of_training(trained):
    """README: its argmax agrees with the model's at 78% of positions (teacher forcing, which is close to its own text)."""
    ids = prompts(8, 96)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    assert torch.equal(trained.generate(ids, **options), trained.generate(ids, **FIXED, **options))
    report = trained.dso.speculation
    assert 0.65 < report.acceptance[0] < 0.9
    assert 0.4 < report.acceptance[1] < 0.8
    assert report.accepted_length > 2
    assert report.proposed[0] > 100


CALLS = {
    "greedy": {"eos_token_id": None},
    "end of text": {"eos_token_id": list(range(40, 70))},
    "penalty": {"eos_token_id": None, "repetition_penalty": 1.3},
    "certain drafts": {"eos_token_id": None, "assistant_confidence_threshold": 0.5},
}


@pytest.mark.parametrize("name", CALLS)
def test_rounds_in_calls_of_several(trained, monkeypatch, name):
    """They are the rounds that run step by step, and the text is that of plain decoding, across blocks of the cache."""
    monkeypatch.setattr(speculation, "DraftLengthController", Always)
    calls, plan = [], trained.dso.plan
    decode = plan.decode_drafted
    monkeypatch.setattr(plan, "decode_drafted", lambda *args: (calls.append(decode(*args)), calls[-1])[1])
    options = {"max_new_tokens": 70, "do_sample": False, "pad_token_id": 2, **CALLS[name]}
    drafted = {**options, "use_mtp": True}
    for ids in prompts(3, 50).split(1):
        calls.clear()
        plain = trained.generate(ids, **options)
        assert torch.equal(plain, trained.generate(ids, **drafted))
        rounds = trained.dso.speculation
        if name == "penalty":  # drafts are penalized too, in Python
            assert not calls
            continue
        assert sum(len(call.rounds) for call in calls) in (len(rounds), len(rounds) - 1)  # there may be room for one token
        assert max(len(call.rounds) for call in calls) > 1
        with monkeypatch.context() as single:
            single.setattr(speculation, "_drafted_rounds", lambda *_: None)
            assert torch.equal(plain, trained.generate(ids, **drafted))
        if name != "certain drafts":
            assert rounds == trained.dso.speculation
        else:
            assert len({n for outcomes in rounds for n, _ in outcomes}) > 1


def test_trained_drafts_of_sampled_text(trained):
    """Drafts are sampled from the layer's distribution after the request's processors, so most are accepted."""
    torch.manual_seed(0)
    options = {"max_new_tokens": 32, "temperature": 0.7, "top_k": 40, "eos_token_id": None, "pad_token_id": 2}
    trained.generate(prompts(8, 64), do_sample=True, num_assistant_tokens=1, **FIXED, **options)
    assert 0.5 < trained.dso.speculation.acceptance[0] < 0.95


def test_trained_drafts_of_copies_and_of_a_conversation(trained):
    from deepseek_optimizer import PagedCache
    from deepseek_optimizer.integration.compat import cache_name

    options = {"max_new_tokens": 50, "eos_token_id": None, "pad_token_id": 2}
    torch.manual_seed(0)
    sampled = {"num_return_sequences": 3, "do_sample": True, "temperature": 0.3, "num_assistant_tokens": 1}
    trained.generate(prompts(2, 64), **sampled, **FIXED, **options)
    assert trained.dso.speculation.acceptance[0] > 0.5
    caches, ids = [PagedCache(trained), PagedCache(trained)], prompts(1, 40)
    for _ in range(3):
        texts = [
            trained.generate(ids, do_sample=False, **drafts, **{cache_name(): cache}, **options)
            for drafts, cache in zip(({}, FIXED), caches, strict=True)
        ]
        assert torch.equal(*texts)
        ids = torch.cat([texts[0], prompts(1, 12)[:, 2:]], dim=1)
    assert trained.dso.speculation.acceptance[0] > 0.4
