"""DeepSeek-V4's MTP layers: loaded under their published names, saved, and drafting in `generate` and in engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepseek_optimizer import CheckpointError, PagedCache, SamplingParams, load_model, make_engine
from deepseek_optimizer.engine.request import Request
from deepseek_optimizer.engine.speculative.bandit import DraftBandit
from deepseek_optimizer.engine.speculative.mtp import MtpProposer
from deepseek_optimizer.integration.compat import cache_name
from deepseek_optimizer.integration.generation import speculation
from deepseek_optimizer.integration.load.pack_checkpoint import pack_checkpoint
from support.family_configs import deepseek_v4
from support.models import random_ids
from support.mtp_files import save_with_mtp

from .conftest import BACKENDS
from .generation.test_speculation import Always
from .test_mtp import assert_same_weights, by_from_pretrained, by_load_model, ways

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Read-only."""
    path = tmp_path_factory.mktemp("v4") / "two"
    save_with_mtp(path, deepseek_v4(num_nextn_predict_layers=2))
    return path


@pytest.fixture(scope="module", params=BACKENDS)
def model(request, folder) -> Any:
    return load_model(folder, backend=request.param, precision="fp32", prefill_chunk=16)


@ways
def test_layers_are_loaded_under_their_published_names(folder, load):
    model, stored = load(folder), load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert len(model.model.layers) == 6 and len(model.dso.mtp_plans) == 2
    for depth in (0, 1):
        ours, theirs = f"model.layers.{4 + depth}", f"mtp.{depth}"
        for own, name in (
            ("enorm.weight", "enorm.weight"),
            ("shared_head.norm.weight", "norm.weight"),
            ("hc_head.hc_fn", "hc_head_fn"),
            ("attn_hc.scale", "hc_attn_scale"),
            ("mlp.gate.e_score_correction_bias", "ffn.gate.bias"),
        ):
            assert torch.equal(state[f"{ours}.{own}"], stored[f"{theirs}.{name}"])
        assert f"{ours}.embed_tokens.weight" not in state and f"{ours}.shared_head.head.weight" not in state


def test_the_models_own_logits_do_not_change(folder, model):
    """Nor do hidden states that Transformers' forward computes, as in the training of an adapter."""
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    ids = torch.tensor([random_ids(plain.config, 40)])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids, use_cache=False).logits, atol=1e-3, rtol=1e-3)
        hidden, expected = (of.model(ids, use_cache=False).last_hidden_state for of in (model, plain))
        torch.testing.assert_close(hidden, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("precision", ["auto", "int4"])
def test_packed_directories_have_the_layers(folder, tmp_path, precision):
    model = by_load_model(folder, precision=precision)
    model.save_pretrained(tmp_path / "saved")
    pack_checkpoint(folder, tmp_path / "converted", {"precision": precision, "backend": "reference"})
    for name in ("saved", "converted"):
        for load in (by_load_model, by_from_pretrained):
            again = load(tmp_path / name)
            assert_same_weights(again, model)
            assert len(again.dso.mtp_plans) == 2


@ways
def test_an_incomplete_layer_is_an_error(folder, tmp_path, load):
    tensors = load_file(folder / "model.safetensors")
    del tensors["mtp.1.h_proj.weight"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.5\.h_proj\.weight"):
        load(tmp_path)


def test_a_layer_with_compressed_entries_is_an_error(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.0.attn.compressor.ape"] = torch.zeros(3, 40)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"contains model\.layers\.4\.self_attn\.compressor\.position_bias"):
        by_load_model(tmp_path)


@pytest.mark.parametrize("lengths", [(9,), (47, 4, 31)], ids=["one", "left-padded"])
@pytest.mark.parametrize("drafts", [1, 2, 5])
def test_greedy_text_equals_plain_decoding(model, lengths, drafts, monkeypatch):
    monkeypatch.setattr(speculation, "DraftLengthController", Always)
    rows = [torch.tensor(random_ids(model.config, n, i)) for i, n in enumerate(lengths)]
    ids = torch.stack([torch.nn.functional.pad(r, (max(lengths) - len(r), 0)) for r in rows])
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]).long()
    options = {"attention_mask": mask, "max_new_tokens": 24, **GREEDY}
    plain = model.generate(ids, **options)
    assert torch.equal(plain, model.generate(ids, use_mtp=True, num_assistant_tokens=drafts, **options))
    assert all(n == drafts for outcomes in model.dso.speculation[:1] for n, _ in outcomes)


def test_drafts_rejected_at_every_offset_of_the_windows(model, monkeypatch):
    """Texts of every length modulo the windows of 3 and 7 tokens, at the end of a block and after it, which continue in a cache
    that drafts were written to."""
    monkeypatch.setattr(speculation, "DraftLengthController", Always)
    text = random_ids(model.config, 60)
    for begin in range(29, 37):
        caches = [PagedCache(model), PagedCache(model)]
        ids = torch.tensor([text[:begin]])
        for more in (3, 1, 7):
            texts = [
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=more, **drafts, **{cache_name(): cache}, **GREEDY
                )
                for drafts, cache in zip(({}, {"use_mtp": True}), caches, strict=True)
            ]
            assert torch.equal(*texts)
            ids = torch.cat((texts[0], torch.tensor([text[begin : begin + 2]])), 1)


def test_rounds_of_one_layer_in_calls_of_several(tmp_path, monkeypatch):
    """They take all streams of a token from one round to the next, and are the rounds that run step by step."""
    save_with_mtp(tmp_path, deepseek_v4(num_nextn_predict_layers=1))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["head.weight"][4:] *= 0.01  # four tokens are likely, so that some drafts are right
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = load_model(tmp_path, backend="cpu", precision="fp32", prefill_chunk=16)
    calls, plan = [], model.dso.plan
    decode = plan.decode_drafted
    monkeypatch.setattr(plan, "decode_drafted", lambda *args: (calls.append(decode(*args)), calls[-1])[1])
    monkeypatch.setattr(speculation, "DraftLengthController", Always)
    accepted = 0
    for begin in (5, 30, 33, 47):
        ids = torch.tensor([random_ids(model.config, begin)])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 60, **GREEDY}
        plain = model.generate(ids, **options)
        for drafts in (1, 3):
            options |= {"use_mtp": True, "num_assistant_tokens": drafts}
            assert torch.equal(plain, model.generate(ids, **options))
            rounds = model.dso.speculation
            accepted += sum(held for outcomes in rounds for _, held in outcomes)
            with monkeypatch.context() as single:
                single.setattr(speculation, "_drafted_rounds", lambda *_: None)
                assert torch.equal(plain, model.generate(ids, **options))
            assert rounds == model.dso.speculation
    assert accepted > 10 and max(len(call.rounds) for call in calls) > 1


def test_drafts_are_those_of_whole_texts(model, monkeypatch):
    """What the layers propose does not depend on chunks, on rejected drafts or on when they have caught up: each draft equals
    that of the layers run over the whole text."""
    made = []
    original = MtpProposer.propose

    def propose(self, sequences, counts):
        drafts = original(self, sequences, counts)
        made.extend((list(s.tokens), d.tokens) for s, d in zip(sequences, drafts, strict=True))
        return drafts

    monkeypatch.setattr(speculation, "DraftLengthController", Always)
    monkeypatch.setattr(MtpProposer, "propose", propose)
    ids = torch.tensor([random_ids(model.config, 50)])
    model.generate(ids, use_mtp=True, num_assistant_tokens=2, max_new_tokens=20, **GREEDY)
    tried = made[:]
    assert len(tried) > 5
    for tokens, drafts in tried[::3]:
        made.clear()
        model.generate(torch.tensor([tokens[:-1]]), use_mtp=True, num_assistant_tokens=2, max_new_tokens=4, **GREEDY)
        assert made[0] == (tokens, drafts)


def engine_of(model: Any, size: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """An engine whose requests always draft, by the model's layers only."""
    monkeypatch.setattr(DraftBandit, "choose", lambda self, room, *rest: min(room, 3))
    engine = make_engine(model, None, arena=model.dso.new_arena(size), **options)
    if engine.core.drafting is not None:
        engine.core.drafting._proposers.pop(0)  # prompt lookup
    return engine


def test_engines_draft_with_the_layers(model, monkeypatch):
    """Also after cached prefixes, and with requests that are preempted."""
    sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    shared = random_ids(model.config, 64)
    prompts = [[*shared, *shared[:n], n] for n in (5, 11, 20, 31)]
    block = model.dso.new_arena(1 << 23).store.block_bytes
    plain = [answer.token_ids for answer in engine_of(model, 1 << 23, monkeypatch, drafts=False).generate(prompts, sampling)]
    for size in (1 << 23, 100 * block):
        engine = engine_of(model, size, monkeypatch)
        for _ in range(2):
            assert [answer.token_ids for answer in engine.generate(prompts, sampling)] == plain
        assert engine.core.drafting.proposed > 100


def test_engines_embed_beside_drafts(model, monkeypatch):
    """A step may return the last hidden states of some rows, and the streams of others."""
    ids, sampling = random_ids(model.config, 70), SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    requests = [Request(ids[:50], sampling), Request(ids, embed=True), Request(ids[20:], sampling)]
    alone = [engine_of(model, 1 << 23, monkeypatch, drafts=False).generate([r])[0] for r in requests]
    together = engine_of(model, 1 << 23, monkeypatch, step_tokens=32).generate(requests)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    torch.testing.assert_close(*(torch.from_numpy(a[1].embedding) for a in (together, alone)), atol=1e-5, rtol=1e-4)
