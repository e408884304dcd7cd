"""PEFT adapters on packed modules: they train, they answer, they come off again."""

from __future__ import annotations

import copy

import pytest
import torch

from deepseek_optimizer import PagedCache
from deepseek_optimizer.integration.compat import cache_name
from deepseek_optimizer.integration.runtime import OptimizerWarning
from support.models import assert_close_rows

peft = pytest.importorskip("peft")


def lora(model, **options):
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **options))


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"])
def test_lora_gives_the_logits_and_gradients_of_the_float_model(fresh_pair, targets):
    ids = fresh_pair.ids(8, 8)
    plain, fast = lora(fresh_pair.plain, target_modules=targets), lora(fresh_pair.fast, target_modules=targets)
    with pytest.warns(OptimizerWarning, match="gradients|wrapped"):
        made = fast(input_ids=ids, labels=ids)
    expected = plain(input_ids=ids, labels=ids)
    assert_close_rows(made.logits.detach(), expected.logits.detach())
    made.loss.backward()
    expected.loss.backward()
    a, b = dict(plain.named_parameters()), dict(fast.named_parameters())
    trained = [name for name, p in b.items() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)
    for name in trained:
        torch.testing.assert_close(b[name].grad, a[name].grad, rtol=1e-3, atol=1e-5)


def test_a_step_of_training_lowers_the_loss(fresh_pair):
    ids = fresh_pair.ids(20, 20)
    model = lora(fresh_pair.fast, target_modules=["q_proj", "v_proj", "gate_proj"])
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_generate_with_an_adapter(fresh_pair):
    ids = fresh_pair.ids(6)
    options = {"input_ids": ids, "max_new_tokens": 8, "do_sample": False}
    before = fresh_pair.fast.generate(**options)
    plain, fast = (lora(m, target_modules=["v_proj", "o_proj"]) for m in (fresh_pair.plain, fresh_pair.fast))
    made = fast.generate(**options)
    assert torch.equal(made, plain.generate(**options))
    assert not torch.equal(made, before)


@torch.no_grad()
def test_the_plan_serves_again_when_the_adapter_is_gone(fresh_pair):
    ids = fresh_pair.ids(6)
    before = fresh_pair.fast(ids).logits
    model = lora(fresh_pair.fast, target_modules=["q_proj"])
    model(input_ids=ids)
    base = model.unload()
    assert base is fresh_pair.fast
    after = base(ids)
    assert torch.equal(after.logits, before)
    assert isinstance(getattr(after, cache_name()), PagedCache)


def test_merging_is_refused(fresh_pair):
    """A packed weight cannot take an adapter in; the weights stay as they were."""
    model = lora(fresh_pair.fast, target_modules=["q_proj"])
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    before = weight.clone()
    with pytest.raises((RuntimeError, ValueError)):
        model.merge_adapter()
    assert torch.equal(weight, before)


def test_adapters_are_saved_and_loaded(fresh_pair, tmp_path):
    ids = fresh_pair.ids(6)
    twin = copy.deepcopy(fresh_pair.fast)
    model = lora(fresh_pair.fast, target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(twin, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
