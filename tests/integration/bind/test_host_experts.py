"""Where the routed experts of a model on a device are: what fits decides, or a setting. No card is needed."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from deepseek_optimizer import DeepSeekConfig, load_model
from deepseek_optimizer.backends import registry
from deepseek_optimizer.errors import BackendError, ConfigError, NotEnoughMemoryError
from deepseek_optimizer.integration.bind import host_experts
from deepseek_optimizer.integration.bind.host_experts import Placement, place_experts, stays_on_host
from deepseek_optimizer.integration.bind.packed_experts import PackedExperts
from deepseek_optimizer.integration.load import loader
from deepseek_optimizer.integration.load.quantizer import PackingQuantizer
from support import family_configs as configs
from support.models import random_model
from support.pretended_card import pretend

pytest.importorskip("triton")
CARD = torch.device("cuda:0")
CACHE = 1 << 20  # bytes
FIELDS = {"backend": "cuda", "precision": "int4", "kv_cache_memory": CACHE}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model of three layers with experts, which are most of its weights."""
    folder = tmp_path_factory.mktemp("experts")
    config = configs.qwen3_moe(num_hidden_layers=3, num_experts=8, moe_intermediate_size=512, hidden_size=128, vocab_size=64)
    random_model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(path):
    return load_model(path, precision="int4")


@pytest.fixture
def card(monkeypatch):
    return lambda **state: pretend(monkeypatch, **state)


def experts_of(model):
    modules = [module for module in model.modules() if isinstance(module, PackedExperts)]
    return modules, sum(weight.nbytes for weight in modules[0].held().values())


def test_what_fits_decides(model, card):
    """As many layers' experts as fit beside everything else are on the device, the last ones."""
    _, layer = experts_of(model)
    card()
    needed = _needed(model)
    for layers, on_host in ((3, 0), (2, 1), (1, 2), (0, 3)):
        free = needed + layers * layer + (256 << 20) + 1000  # and the reserve
        card(free=free)
        placement = place_experts(model, DeepSeekConfig(**FIELDS), CARD)
        assert placement.on_host == on_host
        card(free=free - 2000)
        assert place_experts(model, DeepSeekConfig(**FIELDS), CARD).on_host == min(3, on_host + 1)
    assert str(placement).startswith("the experts of all 3 layers run on the CPU, from the host's memory: of ")
    assert "cpu_expert_layers sets another number" in placement.why
    card(free=CACHE)
    with pytest.raises(NotEnoughMemoryError, match="the model's weights and a KV cache of 1 MB"):
        place_experts(model, DeepSeekConfig(**FIELDS), CARD)


def _needed(model):
    """Bytes that the device needs without experts: other weights, cache and buffers."""
    _, layer = experts_of(model)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - 3 * layer
    config = DeepSeekConfig(**FIELDS)
    backend = registry.choose_backend(config, CARD)[0]
    return host_experts._working_memory(model, config, backend) + weights


def test_without_a_size_of_the_cache_there_is_room_for_a_sequence(model, card):
    card()
    backend = registry.choose_backend(DeepSeekConfig(**FIELDS), CARD)[0]
    given, without = (
        host_experts._working_memory(model, DeepSeekConfig(**FIELDS | {"kv_cache_memory": size}), backend)
        for size in (CACHE, None)
    )
    tokens = min(host_experts.CONTEXT, model.config.max_position_embeddings)
    assert without - (given - CACHE) == -(-tokens // 32) * backend.block_bytes(model.dso.graph, "bf16")


def test_a_setting_decides(model, card):
    card()
    for wanted, on_host in ((0, 0), (2, 2), (99, 3)):
        placement = place_experts(model, DeepSeekConfig(**FIELDS, cpu_expert_layers=wanted), CARD)
        assert (placement.on_host, placement.why) == (on_host, f"cpu_expert_layers={wanted}")
    with pytest.raises(ConfigError, match="cpu_expert_layers=2: the reference backend has no experts on the CPU"):
        place_experts(model, DeepSeekConfig(backend="reference", cpu_expert_layers=2), CARD)
    assert place_experts(model, DeepSeekConfig(cpu_expert_layers=2), torch.device("cpu")).on_host == 0
    in_fp8 = {**FIELDS, "activation": "fp8"}
    assert place_experts(model, DeepSeekConfig(**in_fp8, cpu_expert_layers=0), CARD).on_host == 0
    with pytest.raises(ConfigError, match='activation="fp8": the experts of the first 2 of 3 layers run on the CPU'):
        place_experts(model, DeepSeekConfig(**in_fp8, cpu_expert_layers=2), CARD)
    with pytest.raises(ConfigError, match="cpu_expert_layers must be an integer from 0"):
        DeepSeekConfig(cpu_expert_layers=-1)
    with pytest.raises(ConfigError, match="cpu_expert_layers=2: from_pretrained puts all weights on one device; use load_m"):
        PackingQuantizer(DeepSeekConfig(**FIELDS, cpu_expert_layers=2))._check_device(model, {"": 0})


def test_without_a_backend_for_the_cpu(model, card, monkeypatch):
    card()
    find = host_experts.find
    broken = lambda name: find(name) if name != "cpu" else SimpleNamespace(unavailable_reason=lambda _: "no native build")  # noqa: E731
    monkeypatch.setattr(host_experts, "find", broken)
    with pytest.raises(BackendError, match="cpu_expert_layers=1: no native build"):
        place_experts(model, DeepSeekConfig(**FIELDS, cpu_expert_layers=1), CARD)
    card(free=_needed(model) + (256 << 20))
    assert place_experts(model, DeepSeekConfig(**FIELDS), CARD).on_host == 0  # nothing else is possible, if it fits at all


def test_experts_in_the_hosts_memory_are_checked_too(path, card, monkeypatch):
    """Before any weights are read."""
    card()
    checked = []
    monkeypatch.setattr(
        host_experts, "check_memory", lambda tensors, *where: checked.append((sum(t.nbytes for t in tensors), *where))
    )
    monkeypatch.setattr(loader, "weights_for", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(pytest.fail.Exception, match="weights were read"):
        load_model(path, **FIELDS, cpu_expert_layers=2)
    (device, where, cache), (host,) = checked
    assert (where, cache) == (CARD, CACHE) and host > device > 0


def test_stacks_stay_where_they_are(path):
    """While a model is filled and moved; everything else goes."""
    model = load_model(path, precision="int4")
    modules, _ = experts_of(model)
    Placement(tuple(modules), 1, "a reason").mark()
    first, second = ("model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.down_proj")
    assert stays_on_host(model, first) and not stays_on_host(model, second)
    assert not stays_on_host(model, "model.layers.0.self_attn.q_proj.weight")
    assert model.dso.compile_options.host_experts == ("model.layers.0.mlp.experts.gate_up_proj",)
    names = list(dict(modules[0].named_parameters()))
    meta = torch.device("meta")
    for module in modules:
        module.register_parameter("down_proj_bias", torch.nn.Parameter(torch.zeros(8, 128)))
        torch.nn.Module.to(module, meta)
    assert modules[0].down_proj.is_cpu and modules[0].gate_up_proj.is_cpu and modules[0].down_proj_bias.is_meta
    assert modules[1].down_proj.is_meta and list(dict(modules[0].named_parameters())) == [*names, "down_proj_bias"]
    stacks = modules[2].down.data, modules[2].gate_up.data
    loader._fill(model, [(first, modules[0].down_proj.data), (second, torch.zeros(3))], meta)
    assert modules[0].down_proj.is_cpu and modules[1].down_proj.is_meta and all(stack.is_meta for stack in stacks)


def test_the_choice_is_said(path, caplog):
    model = load_model(path, precision="int4")
    modules, _ = experts_of(model)
    assert model.report().experts.placement == ""
    with caplog.at_level(logging.INFO, logger="deepseek_optimizer"):
        model.dso.placed(Placement(tuple(modules), 2, "cpu_expert_layers=2"))
    said = "the experts of the first 2 of 3 layers run on the CPU, from the host's memory: cpu_expert_layers=2"
    row = model.report().experts
    assert caplog.messages == [said] and (row.on_cpu, row.placement) == (2, said)
    assert "the first 2 of 3 layers run on the CPU" in str(model.report())
    model.dso.placed(Placement((), 0, ""))
    assert model.report().experts.placement == ""


def test_a_move_to_a_device_without_a_choice_ends_the_last_one(path):
    model = load_model(path, precision="int4")
    modules, _ = experts_of(model)
    placement = Placement(tuple(modules), 2, "cpu_expert_layers=2")
    placement.mark()
    model.dso.placed(placement)
    model.to("meta")
    assert model.dso.placement is None and not any(module.on_host for module in modules)
    assert all(tensor.is_meta for tensor in model.parameters())
