"""Preparing a model for training: its results, its names, and that it is restored afterwards."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP

from deepseek_optimizer.integration.bind.modules import PackedLinear
from deepseek_optimizer.train.prepare import prepare
from support.family_configs import llama, qwen3
from support.models import CASES, random_model
from support.training import Rows

PLAIN = ["llama-gqa", "llama-tied", "llama-biases", "llama-mqa", "llama-wide-heads", "llama-linear", "qwen2-gqa", "qwen3-gqa"]
PLAIN += ["deepseek_v4-mixed"]


def _batch(count: int = 3, length: int = 17) -> dict[str, torch.Tensor]:
    rows = Rows(count, length)
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}


def _loss_and_gradients(model, kept=None, **more):
    model.train()
    model.zero_grad()
    if kept is None:
        loss = model(**_batch(), **more).loss
    else:
        with kept:
            loss = model(**_batch(), **more).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("memory", ["full", "selective", "recompute"])
@pytest.mark.parametrize("case", [name for name in CASES if name in PLAIN])
def test_losses_and_gradients_equal_transformers(case, memory):
    model = random_model(CASES[case]())
    loss, gradients = _loss_and_gradients(model)
    prepared = prepare(model, activation_memory=memory)
    ours, our_gradients = _loss_and_gradients(model, prepared.saved)
    prepared.undo()
    torch.testing.assert_close(ours, loss, rtol=2e-6, atol=0)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(our_gradients[name] / scale, gradient / scale, rtol=0, atol=2e-5, msg=name)


def test_all_recompute_settings_give_the_same_bits():
    actual = []
    for memory in ("full", "selective", "recompute"):
        model = random_model(llama(), dtype=torch.bfloat16)
        prepared = prepare(model, activation_memory=memory)
        actual.append(_loss_and_gradients(model, prepared.saved))
    for loss, gradients in actual[1:]:
        assert torch.equal(loss, actual[0][0])
        assert all(torch.equal(gradients[name], actual[0][1][name]) for name in gradients)


def test_num_items_shifted_labels_and_ignored_labels():
    model = random_model(llama())
    batch = _batch()
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[..., 1:].clone()
    shifted[0, 3] = -100
    for more in ({"num_items_in_batch": torch.tensor(57)}, {"shift_labels": shifted}, {"num_items_in_batch": 57}):
        expected, _ = _loss_and_gradients(model, **more)
        prepared = prepare(model)
        ours, _ = _loss_and_gradients(model, prepared.saved, **more)
        prepared.undo()
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=0)


def test_everything_is_replaced_and_restored():
    model = random_model(qwen3())
    before = {name: type(module) for name, module in model.named_modules()}
    attention, state = model.config._attn_implementation, copy.deepcopy(model.state_dict())
    signature = inspect.signature(model.forward)
    prepared = prepare(model)
    assert prepared.native == {
        "Qwen3ForCausalLM": 1, "Qwen3DecoderLayer": 3, "Qwen3Attention": 3, "Qwen3MLP": 3, "Qwen3RMSNorm": 13, "Linear": 22,
        "Embedding": 1,
    }  # fmt: skip
    assert not prepared.others and prepared.fused_loss
    for name, module in model.named_modules():
        assert isinstance(module, before[name]) and type(module).__name__ == before[name].__name__
    assert inspect.signature(model.forward) == signature
    assert model.state_dict().keys() == state.keys()
    prepared.undo()
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == attention
    assert not any("kept" in module.__dict__ or "forward" in module.__dict__ for module in model.modules())


def test_logits_on_request():
    model = random_model(llama()).eval()
    batch = _batch()
    expected = model(**batch)
    prepare(model)
    for outputs in (model(**batch), model(**batch, skip_logits=False), model(input_ids=batch["input_ids"])):
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=2e-4)
    skipped = model(**batch, skip_logits=True)
    assert skipped.logits is None
    torch.testing.assert_close(skipped.loss, expected.loss)
    assert torch.equal(model(**batch, skip_logits=True, return_dict=False)[0], skipped.loss)


def test_generation_and_caches_still_run():
    model = random_model(llama()).eval()
    ids = _batch(1, 9)["input_ids"]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    prepare(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), expected)


def test_saved_while_prepared(tmp_path):
    model = random_model(llama())
    prepare(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is LlamaForCausalLM and again.config.architectures == ["LlamaForCausalLM"]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_copied_while_prepared():
    model = random_model(llama())
    prepared = prepare(model)
    twin = copy.deepcopy(model)
    assert twin.model.layers[0].input_layernorm.saved is twin.model.norm.saved is not prepared.saved
    assert torch.equal(_loss_and_gradients(twin)[0], _loss_and_gradients(model)[0])


def test_modules_with_hooks_or_custom_forwards_are_called():
    model = random_model(llama())
    seen = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: seen.append("hook"))
    down = model.model.layers[1].mlp.down_proj
    plain = down.forward
    down.forward = lambda x: seen.append("own") or plain(x)
    prepared = prepare(model)
    _loss_and_gradients(model, prepared.saved)
    assert sorted(seen) == ["hook", "own"] and "forward" in down.__dict__
    assert any("has a forward on the instance" in note for note in prepared.notes)


def test_a_class_changed_meanwhile_is_left_unchanged():
    model = random_model(llama())
    prepared = prepare(model)
    mlp = model.model.layers[0].mlp
    mlp.__class__ = sharded = type("Sharded", (type(mlp),), {})
    prepared.undo()
    assert type(mlp) is sharded and type(model.model.layers[1].mlp) is LlamaMLP


def test_unsupported_modules_stay_and_are_reported():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=211, n_embd=48, n_layer=1, n_head=2, n_positions=64))
    expected, _ = _loss_and_gradients(model.eval())
    prepared = prepare(model)
    assert not prepared.fused_loss
    assert prepared.native == {"Linear": 1, "Embedding": 2} and prepared.others == {"LayerNorm": 3, "Conv1D": 4}
    assert any("attention" in note for note in prepared.notes)
    assert torch.isfinite(_loss_and_gradients(model, prepared.saved)[0])


def test_a_scaled_or_capped_head_is_not_replaced():
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {"vocab_size": 211, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=8.0, num_key_value_heads=1)).train()
    loss = model(**_batch()).loss
    prepared = prepare(model)
    assert "GraniteForCausalLM" not in prepared.native and "GraniteAttention" not in prepared.native
    torch.testing.assert_close(model(**_batch()).loss, loss)


def test_packed_models(tmp_path, tiny_model):
    from deepseek_optimizer import DeepSeekConfig, load_model

    model = load_model(tiny_model, DeepSeekConfig(precision="int4"))
    forward = model.__dict__["forward"]
    batch = {"input_ids": torch.arange(40)[None], "labels": torch.arange(40)[None]}
    expected = model(**batch).loss
    prepared = prepare(model)
    assert "forward" not in model.__dict__ and prepared.fused_loss
    assert type(model.model.layers[0].mlp.up_proj) is PackedLinear
    loss = model(**batch, skip_logits=True)
    assert loss.logits is None
    torch.testing.assert_close(loss.loss.float(), expected.float(), rtol=0.02, atol=0)
    prepared.undo()
    assert model.__dict__["forward"] is forward


def test_hooks_on_norms_and_projections_are_called():
    model, seen = random_model(llama()), []
    prepare(model)
    layer = model.model.layers[1]
    for module in (layer.input_layernorm, layer.self_attn.k_proj, layer.mlp.up_proj):
        module.register_forward_hook(lambda module, *_: seen.append(module))
    model(**_batch())
    assert seen == [layer.input_layernorm, layer.self_attn.k_proj, layer.mlp.up_proj]
