"""PEFT's LoRA layers on optimized models: the plan adds what their active adapters add."""

from __future__ import annotations

import warnings

import pytest
import torch

from deepseek_optimizer import PagedCache, load_model
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.integration.compat import cache_name
from support.lora import adapted, save_adapter
from support.models import CASES, assert_close_rows, random_model

from .conftest import BACKENDS, make_pair

peft = pytest.importorskip("peft")
ATTENTION = ("q_proj", "kv_b_proj", "o_proj")


@pytest.fixture
def folders(fresh_pair, tmp_path):
    return {
        "first": save_adapter(fresh_pair.plain, tmp_path / "a", seed=1, targets=["q_proj", "up_proj"]),
        "second": save_adapter(fresh_pair.plain, tmp_path / "b", seed=2, targets=["q_proj", "v_proj", "down_proj"], r=17),
    }


@torch.no_grad()
def planned(model, ids):
    """The logits of a call that the plan serves, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", OptimizerWarning)
        made = model(input_ids=ids)
    assert isinstance(getattr(made, cache_name()), PagedCache)
    return made.logits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["llama-biases", "deepseek_v3-groups", "phi3-window"])
@torch.no_grad()
def test_logits_are_those_of_peft(case, backend, tmp_path):
    pair = make_pair(case, backend=backend)
    names = {name.rpartition(".")[2] for name, _ in pair.plain.named_modules()}
    targets = [name for name in (*ATTENTION, "qkv_proj") if name in names]
    folder = save_adapter(pair.plain, tmp_path / "a", targets=targets)
    ids = pair.ids(12, 7)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    plain, fast = (peft.PeftModel.from_pretrained(model, folder) for model in (pair.plain, pair.fast))
    assert_close_rows(planned(fast, ids), plain(input_ids=ids).logits)
    made, expected = (model(input_ids=ids, attention_mask=mask).logits for model in (fast, plain))
    assert_close_rows(made[1, 5:], expected[1, 5:])
    options = {"input_ids": ids[:1], "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(fast.generate(**options), plain.generate(**options))
    assert torch.equal(fast.generate(**options, prompt_lookup_num_tokens=3), plain.generate(**options))


@torch.no_grad()
def test_methods_of_transformers(fresh_pair, folders, monkeypatch):
    """load_adapter, set_adapter, disable_adapters, enable_adapters, active_adapters, delete_adapter."""
    # Transformers 5.2x asks for PEFT 0.22 in some of them, which is not released.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    ids, plain, fast = fresh_pair.ids(9), fresh_pair.plain, fresh_pair.fast
    before = fast(ids).logits
    for name, folder in folders.items():
        for model in (plain, fast):
            model.load_adapter(str(folder), adapter_name=name)
        assert fast.active_adapters() == [name]
        assert_close_rows(planned(fast, ids), plain(ids).logits)
    with_second = planned(fast, ids)
    for chosen in ("first", ["first", "second"]):
        for model in (plain, fast):
            model.set_adapter(chosen)
        assert_close_rows(planned(fast, ids), plain(ids).logits)
        assert not torch.equal(planned(fast, ids), with_second)
    fast.disable_adapters()
    assert torch.equal(planned(fast, ids), before)
    fast.enable_adapters()
    fast.set_adapter("second")
    assert torch.equal(planned(fast, ids), with_second)
    fast.delete_adapter("second")
    fast.set_adapter("first")
    plain.set_adapter("first")
    assert_close_rows(planned(fast, ids), plain(ids).logits)
    fast.delete_adapter("first")
    assert torch.equal(planned(fast, ids), before)


@torch.no_grad()
def test_loading_a_model_with_an_adapter(tmp_path):
    plain = random_model(CASES["llama-gqa"]())
    plain.save_pretrained(tmp_path / "model")
    folder = save_adapter(plain, tmp_path / "a")
    model = load_model(tmp_path / "model", precision="fp32", adapter=folder)
    ids = torch.tensor([[5, 3, 8, 1]])
    assert set(model.peft_config) == {"default"}
    assert_close_rows(planned(model, ids), adapted(plain, folder)(input_ids=ids).logits)


@torch.no_grad()
def test_changed_adapters_are_read_again(fresh_pair, folders):
    ids = fresh_pair.ids(9)
    plain, fast = (peft.PeftModel.from_pretrained(m, folders["first"]) for m in (fresh_pair.plain, fresh_pair.fast))
    first = planned(fast, ids)
    for model in (plain, fast):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    assert_close_rows(planned(fast, ids), plain(input_ids=ids).logits)
    assert not torch.equal(planned(fast, ids), first)
    for layer in (module for model in (plain, fast) for module in model.modules() if hasattr(module, "lora_A")):
        layer.set_scale("default", 0.5)
    assert_close_rows(planned(fast, ids), plain(input_ids=ids).logits)


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head", "q_proj"]}, {"lora_bias": True}])
@torch.no_grad()
def test_what_the_plan_cannot_add_runs_in_transformers_forward(fresh_pair, options):
    ids, wrapped = fresh_pair.ids(9), []
    for model in (fresh_pair.plain, fresh_pair.fast):
        torch.manual_seed(0)
        config = peft.LoraConfig(**{"r": 4, "init_lora_weights": False, "target_modules": ["q_proj"]} | options)
        wrapped.append(peft.get_peft_model(model, config).eval())
    plain, fast = wrapped
    with pytest.warns(OptimizerWarning, match="has an adapter|is not plain LoRA"):
        made = fast(input_ids=ids).logits
    assert_close_rows(made, plain(input_ids=ids).logits)
