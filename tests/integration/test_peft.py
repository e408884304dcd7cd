"""PEFT adapters on packed modules: trained, used, and removed again."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer, PagedCache, UnsupportedRequestError, load_model
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.integration.compat import cache_name
from support.models import CASES, assert_close_rows, random_ids, random_model, randomize

from .conftest import make_pair

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
def test_the_plan_is_used_again_after_the_adapter_is_removed(fresh_pair):
    ids = fresh_pair.ids(6)
    before = fresh_pair.fast(ids).logits
    model = lora(fresh_pair.fast, target_modules=["q_proj"])
    model(input_ids=ids)
    base = model.unload()
    assert base is fresh_pair.fast
    after = base(ids)
    assert torch.equal(after.logits, before)
    assert isinstance(getattr(after, cache_name()), PagedCache)


@pytest.mark.parametrize(
    ("case", "targets"),
    [("llama-gqa", "all-linear"), ("llama-tied", ["embed_tokens", "v_proj"]), ("deepseek_v3-groups", ["kv_b_proj", "o_proj"])],
)
@torch.no_grad()
def test_merging_gives_the_merged_float_model(case, targets):
    pair = make_pair(case)
    ids = pair.ids(8)
    plain, fast = (lora(m, target_modules=targets) for m in (pair.plain, pair.fast))
    merged, expected = fast.merge_and_unload(safe_merge=True), plain.merge_and_unload()
    assert merged is pair.fast
    made = merged(ids)
    assert isinstance(getattr(made, cache_name()), PagedCache)
    assert_close_rows(made.logits, expected(ids).logits)
    assert not merged.dso.notes


@torch.no_grad()
def test_a_merge_can_be_undone(fresh_pair):
    ids = fresh_pair.ids(8)
    model = lora(fresh_pair.fast, target_modules=["q_proj", "down_proj"])
    beside = model(input_ids=ids).logits
    with model.disable_adapter():
        without = model(input_ids=ids).logits
    for merging in range(2):
        model.merge_adapter()
        assert_close_rows(model(input_ids=ids).logits, beside)
        if merging:
            with model.disable_adapter():  # undone automatically
                assert_close_rows(model(input_ids=ids).logits, without)
        else:
            model.unmerge_adapter()
            assert_close_rows(model(input_ids=ids).logits, beside)


@torch.no_grad()
def test_a_copy_merges_into_its_own_weights(fresh_pair):
    ids = fresh_pair.ids(8)
    model = lora(fresh_pair.fast, target_modules=["q_proj"])
    twin = copy.deepcopy(model)
    beside = model(input_ids=ids).logits
    merged = twin.merge_and_unload()
    assert_close_rows(merged(ids).logits, beside)
    assert torch.equal(model(input_ids=ids).logits, beside)


@torch.no_grad()
def test_merging_into_a_quantized_format_warns():
    pair = make_pair()
    DynamicGraphOptimizer(pair.plain, config=DeepSeekConfig(precision="int8", backend="reference")).optimize()
    ids = pair.ids(8)
    model = lora(pair.plain, target_modules=["q_proj", "v_proj"])
    beside = model(input_ids=ids).logits
    with pytest.warns(OptimizerWarning, match="packed as int8.*rounds the sum again.*merge it into the float model"):
        merged = model.merge_and_unload()
    assert_close_rows(merged(ids).logits, beside, 0.03)


@torch.no_grad()
def test_failed_merges_are_errors_and_change_nothing(fresh_pair):
    model = peft.get_peft_model(
        fresh_pair.fast, peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    before = copy.deepcopy(fresh_pair.fast.state_dict())
    with pytest.raises(UnsupportedRequestError, match="cannot be merged into packed weights; merge it into the float model"):
        model.merge_and_unload()
    assert all(torch.equal(value, before[name]) for name, value in fresh_pair.fast.state_dict().items())


@torch.no_grad()
def test_merging_does_not_reach_the_file_that_weights_are_mapped_from(fresh_pair, tmp_path):
    fresh_pair.fast.save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    before, ids = file.read_bytes(), fresh_pair.ids(8)
    mapped = load_model(tmp_path / "packed", backend="auto")
    plain, fast = (lora(m, target_modules="all-linear") for m in (fresh_pair.plain, mapped))
    assert_close_rows(fast.merge_and_unload()(ids).logits, plain.merge_and_unload()(ids).logits)
    assert file.read_bytes() == before


def test_a_broken_adapter_is_not_merged(fresh_pair):
    model = lora(fresh_pair.fast, target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight.data[0, 0] = torch.nan
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="not finite.*'default' is probably damaged"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged_adapters


def test_an_adapter_too_large_for_the_format_is_not_merged():
    plain = random_model(CASES["llama-gqa"]())
    config = DeepSeekConfig(precision="int4", calibration="none", backend="reference")
    model = lora(DynamicGraphOptimizer(plain, config=config).optimize(), target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight.data.fill_(1.0)
    layer.lora_B["default"].weight.data.fill_(1e8)
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match=r"the merged matrix has weights of up to .*e\+0\d, which are too large for int4"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged_adapters


@torch.no_grad()
def test_adapters_on_a_classifier():
    config = CASES["llama-gqa"]()
    config.pad_token_id, config.num_labels = 0, 3
    plain = randomize(AutoModelForSequenceClassification.from_config(config).eval())
    fast = copy.deepcopy(plain)
    DynamicGraphOptimizer(fast, config=DeepSeekConfig(precision="fp32", backend="reference")).optimize()
    ids = torch.tensor([random_ids(config, 9)])
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"}
    wrapped = [lora(model, **options) for model in (plain, fast)]
    assert_close_rows(wrapped[1](input_ids=ids).logits, wrapped[0](input_ids=ids).logits)
    made, expected = (model.merge_and_unload()(ids) for model in wrapped[::-1])
    assert isinstance(getattr(made, cache_name()), PagedCache)
    assert_close_rows(made.logits, expected.logits)


def test_adapters_are_saved_and_loaded(fresh_pair, tmp_path):
    ids = fresh_pair.ids(6)
    twin = copy.deepcopy(fresh_pair.fast)
    model = lora(fresh_pair.fast, target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(twin, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
