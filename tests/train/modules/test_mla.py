"""Latent attention in training: against Transformers' forward, with gradients; calls that are left to Transformers."""

from __future__ import annotations

import copy

import pytest
import torch

from deepseek_optimizer.train.modules.mla import TrainedLatentAttention
from support.family_configs import deepseek_v3, llama
from support.models import CASES, random_ids, random_model

LATENT = [name for name in CASES if name.split("-")[0] in ("deepseek_v2", "deepseek_v3", "youtu")]


def prepared(model):
    """A copy with our latent attention."""
    twin = copy.deepcopy(model)
    swapped = 0
    for module in twin.modules():
        if TrainedLatentAttention.fits(module):
            module.__class__ = type("Trained", (TrainedLatentAttention, type(module)), {})
            swapped += 1
    assert swapped == model.config.num_hidden_layers
    return twin


@pytest.mark.parametrize("name", LATENT)
def test_loss_and_gradients_equal_transformers(name):
    own = random_model(CASES[name]())
    own.set_attn_implementation("sdpa")
    ours = prepared(own)
    ids = torch.tensor([random_ids(own.config, 21, seed) for seed in (0, 1)])
    made = []
    for model in (ours.train(), own.train()):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        made.append(loss.detach())
    torch.testing.assert_close(*made, rtol=1e-5, atol=1e-5)
    grads = dict(own.named_parameters())
    for path, parameter in ours.named_parameters():
        if parameter.grad is not None or grads[path].grad is not None:
            torch.testing.assert_close(parameter.grad, grads[path].grad, rtol=1e-3, atol=2e-5, msg=path)


def test_packed_documents_and_padding():
    own = random_model(deepseek_v3())
    own.set_attn_implementation("sdpa")
    ours = prepared(own)
    ids = torch.tensor([random_ids(own.config, 20)])
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    for where in ({"position_ids": positions}, {"attention_mask": mask}):
        a, b = (model(input_ids=ids, use_cache=False, **where).logits for model in (ours, own))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_caches_and_eager_attention_are_left_to_transformers():
    own = random_model(deepseek_v3())
    ours = prepared(own)
    ids = torch.tensor([random_ids(own.config, 9)])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **options), own.generate(ids, **options))
    assert torch.equal(ours(ids, use_cache=False).logits, own(ids, use_cache=False).logits)  # eager: the same code


def test_adapters_replace_projections():
    peft = pytest.importorskip("peft")
    own = random_model(deepseek_v3())
    own.set_attn_implementation("sdpa")
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_b_proj", "kv_b_proj", "o_proj"])
    torch.manual_seed(0)
    ours = prepared(own)
    ours, own = (peft.get_peft_model(model, copy.deepcopy(config)) for model in (ours, own))
    ours.load_state_dict(own.state_dict())
    ids = torch.tensor([random_ids(own.config, 15)])
    for model in (ours, own):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    trained = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert len(trained) == 3 * 3 * 2
    for name in trained:
        torch.testing.assert_close(ours.get_parameter(name).grad, own.get_parameter(name).grad, rtol=1e-3, atol=2e-5)


def test_unsupported_modules():
    for config in (CASES["deepseek_v32-indexer"](), llama()):
        assert not any(TrainedLatentAttention.fits(m) for m in random_model(config).modules())
