"""Loading, packing, saving and copying models on the general path, and what it refuses."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from deepseek_optimizer import (
    CheckpointError,
    ConfigError,
    DeepSeekConfig,
    DynamicGraphOptimizer,
    NotEnoughMemoryError,
    UnsupportedModelError,
    UnsupportedRequestError,
    load_model,
    make_engine,
    report,
)
from deepseek_optimizer.integration.general.modules import GeneralLinear
from deepseek_optimizer.integration.memory import weights
from deepseek_optimizer.system.memory import FreeMemory, Limit
from support.general_models import inputs_of, random_general


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a float model by name, and the model."""
    made = {}

    def get(name):
        if name not in made:
            model, folder = random_general(name), tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = folder, model
        return made[name]

    return get


def outputs(model):
    with torch.no_grad():
        return model(**inputs_of(model))[0]


@pytest.mark.parametrize("name", ["bert-mlm", "gpt2", "t5"])
def test_a_packed_copy_loads_mapped_and_gives_the_same(saved, tmp_path, name):
    fast = load_model(saved(name)[0], precision="int4")
    fast.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert type(again) is type(fast) and again.dso.mappings
    assert again.report().formats == fast.report().formats and again.dso.config.precision == "int4"
    assert torch.equal(outputs(again), outputs(fast))


def test_a_packed_copy_loads_in_another_class(saved, tmp_path):
    fast = load_model(saved("bert-mlm")[0], precision="int8")
    fast.save_pretrained(tmp_path)
    inner = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert inner.report().path == "plan"
    with torch.no_grad():
        call = inputs_of(fast)
        assert torch.equal(inner(**call)[0], fast.bert(**call)[0])


def test_packed_copies_keep_their_formats(saved, tmp_path):
    load_model(saved("gpt2")[0], precision="int8").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is packed as int8, not int4"):
        load_model(tmp_path, precision="int4")
    assert load_model(tmp_path, threads=1).dso.backend.threads in (1, None)


def test_from_pretrained_and_in_place(saved):
    folder, plain = saved("roberta")
    config = DeepSeekConfig(precision="int8")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config)
    packed = DynamicGraphOptimizer(copy.deepcopy(plain), config=config).optimize()
    assert torch.equal(outputs(loaded), outputs(packed))
    assert report(packed).layers == loaded.report().layers
    again = DynamicGraphOptimizer(packed, config=config).optimize()
    assert torch.equal(outputs(again), outputs(loaded))


def test_heads_stay_in_torch_and_train(saved):
    model = load_model(saved("roberta")[0], precision="int8")
    assert type(model.classifier.dense) is torch.nn.Linear
    assert not any(p.requires_grad for p in model.roberta.parameters())
    model(**inputs_of(model), labels=torch.tensor([0, 2])).loss.backward()
    assert model.classifier.out_proj.weight.grad.abs().sum() > 0


def test_gradients_flow_through_packed_layers(saved):
    folder, plain = saved("bert")
    fast = load_model(folder, precision="fp32")
    gradients = []
    for model in (plain, fast):
        embeds = torch.randn(1, 5, 36, generator=torch.Generator().manual_seed(3)).requires_grad_()
        model(inputs_embeds=embeds)[0].square().sum().backward()
        gradients.append(embeds.grad)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-4 * gradients[0].abs().max()


def test_formats_by_name(saved):
    folder, _ = saved("gpt2")
    model = load_model(folder, precision="int8", formats={"transformer.h.*.mlp.*": "int4"})
    assert {row.format: row.matrices for row in model.report().formats} == {"int8": 4, "int4": 4}
    assert load_model(folder, precision="int8", formats={"lm_head": "fp32"}).report().head is None
    assert load_model(folder, formats={"lm_head": "int4"}).report().head == "int4"
    with pytest.raises(ConfigError, match=r"'transformer.wte', which is not a linear layer that the general path packs"):
        load_model(folder, formats={"transformer.wte": "int8"})


def test_the_weight_of_a_packed_layer(saved):
    _, plain = saved("gpt2")
    model = load_model(saved("gpt2")[0], precision="fp32")
    layer, own = model.transformer.h[0].mlp.c_fc, plain.transformer.h[0].mlp.c_fc.weight
    assert layer.weight.shape == own.shape and layer.weight.dtype == own.dtype and isinstance(layer.weight, torch.nn.Parameter)
    assert torch.equal(layer.weight + 0, own) and torch.equal(torch.cat([layer.weight, own])[:36], own)
    assert model.num_parameters() == plain.num_parameters()


def test_copies_are_independent_and_pickles_refused(saved):
    import pickle

    from deepseek_optimizer import BackendError

    model = load_model(saved("bert")[0], precision="int8")
    expected = outputs(model)
    twin = copy.deepcopy(model)
    assert twin.dso is not model.dso and twin.dso.model is twin
    del model
    assert torch.equal(outputs(twin), expected)
    with pytest.raises(BackendError, match="cannot be pickled"):
        pickle.dumps(twin)


def test_casts_are_refused(saved):
    model = load_model(saved("bert")[0], precision="int8")
    with pytest.raises(UnsupportedRequestError, match="packed as int8"):
        model.encoder.half()


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_cache": "int8"}, {"kv_cache_memory": 1 << 20}, {"attention_optimization": "sliding"}, {"sparse_attention": True},
        {"kl_budget": 0.1}, {"calibration": "text.txt"}, {"batch_invariant": True},
        {"context_extension": "yarn", "context_length": 256},
    ],
)  # fmt: skip
def test_settings_that_need_a_plan(saved, fields):
    folder, plain = saved("gpt2")
    name = next(iter(fields))
    with pytest.raises(ConfigError, match=f"{name}=.* needs an execution plan.*leave {name} unset.*gpt2"):
        load_model(folder, **fields)
    if not {"kl_budget", "calibration"} & fields.keys():
        with pytest.raises(ConfigError, match=f"{name}=.* needs an execution plan"):
            DynamicGraphOptimizer(plain, config=DeepSeekConfig(**fields))


def test_strict(saved):
    folder, plain = saved("gpt2")
    for load in (
        lambda: load_model(folder, strict=True),
        lambda: load_model(folder, DeepSeekConfig(strict=True)),
        lambda: AutoModel.from_pretrained(folder, quantization_config=DeepSeekConfig(strict=True)),
        lambda: DynamicGraphOptimizer(plain, config=DeepSeekConfig(strict=True)),
    ):
        with pytest.raises(UnsupportedModelError, match="'gpt2' is not supported. Supported: llama"):
            load()


def test_a_known_family_with_a_feature_that_no_plan_supports(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=99, hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=3, hidden_act="relu"
    )
    plain = LlamaForCausalLM(config).eval()
    plain.save_pretrained(tmp_path)
    fast = load_model(tmp_path, precision="fp32")
    assert "hidden_act" in fast.report().reason
    assert (outputs(fast) - outputs(plain)).abs().max() < 1e-5


def test_what_needs_a_plan_is_a_typed_error(saved):
    model = load_model(saved("gpt2")[0], precision="int8")
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel has no execution plan for decoding.*model\.generate"):
        make_engine(model)


def spoil(folder, target, **changes):
    """A copy of a checkpoint with other tensors; None removes one."""
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name)
        if value is not None:
            tensors[name] = value
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def test_damaged_checkpoints(saved, tmp_path):
    folder, plain = saved("bert")
    packed, norm = "encoder.layer.1.output.dense.weight", "encoder.layer.0.output.LayerNorm.weight"
    good = plain.state_dict()
    bad = good[packed].clone()
    bad[3, 4] = torch.nan
    for i, (changes, message) in enumerate(
        [
            ({packed: None}, "layer.1.output.dense.weight.*is missing"),
            ({norm: None}, "lacks .*LayerNorm.weight"),
            ({packed: bad}, "layer.1.output.dense.weight.*NaN"),
            ({norm: good[norm] * torch.inf}, "LayerNorm.weight.*NaN or infinite"),
            ({packed: good[packed][:20].clone()}, r"layer.1.output.dense.weight.*\(20, 52\)"),
        ]
    ):
        with pytest.raises(CheckpointError, match=message):
            load_model(spoil(folder, tmp_path / str(i), **changes))


def test_other_quantization_and_unknown_types(saved, tmp_path):
    folder, _ = saved("bert")
    spoil(folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for fields, error, message in (
        ({"quantization_config": {"quant_method": "hqq"}}, CheckpointError, "hqq"),
        ({"model_type": "new"}, UnsupportedModelError, "'new' is not supported"),
        ({"num_attention_heads": 5}, ConfigError, "5 does not divide hidden_size 36"),
        ({"type_vocab_size": "x"}, ConfigError, "Transformers cannot load this as a BertModel"),
    ):
        (tmp_path / "m/config.json").write_text(json.dumps({**config, **fields}))
        with pytest.raises(error, match=message):
            load_model(tmp_path / "m")


def test_memory_is_checked_before_weights_are_read(saved, monkeypatch):
    monkeypatch.setattr(
        weights, "device_memory", lambda _: FreeMemory((Limit("machine", "this test", "memory", 10_000, 10_000),))
    )
    with pytest.raises(NotEnoughMemoryError, match="the model's weights"):
        load_model(saved("bert")[0], precision="int8")


def test_the_report(saved):
    text = str(load_model(saved("mpnet")[0], precision="int8").report())
    for part in (
        "MPNetModel (mpnet)",
        "general path",
        "13 linear layers",
        "Embedding",
        "Transformers' own",
        "'mpnet' is not",
    ):
        assert part in text
    json.dumps(load_model(saved("t5")[0]).report().to_dict())


def test_adapters(saved):
    peft = pytest.importorskip("peft")
    model = load_model(saved("gpt2")[0], precision="int8")
    plain = outputs(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn", "c_proj"], init_lora_weights=True))
    difference = outputs(adapted) - plain  # torch computes the activation between layers that are wrapped
    assert difference.abs().max() <= 1e-3 * plain.abs().max()
    adapted(**inputs_of(model), labels=inputs_of(model)["input_ids"]).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters())
    assert any(isinstance(m, GeneralLinear) for m in adapted.modules())
