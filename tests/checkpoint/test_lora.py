"""PEFT adapters: settings and tensors are read as PEFT does, and everything that is not supported is refused by name."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_optimizer.checkpoint.lora import LoraFile
from deepseek_optimizer.checkpoint.lora_config import LoraConfig
from deepseek_optimizer.errors import AdapterError, CheckpointError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.adapters import UNFUSED, with_adapters
from deepseek_optimizer.integration.load.lora import read_adapter
from deepseek_optimizer.models import build_graph
from support.family_configs import llama
from support.lora import save_adapter
from support.models import CASES, random_model

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model():
    return random_model(llama())


def graph_of(model, rank=64):
    return with_adapters(rules.apply(build_graph(model.config), [n for n in rules.RULES if n not in UNFUSED])[0], rank)


@pytest.fixture
def folder(model, tmp_path):
    return save_adapter(model, tmp_path / "adapter")


def change_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("stabilized", [False, True])
def test_scales_and_ranks_are_those_of_peft(model, tmp_path, stabilized):
    patterns = {
        "rank_pattern": {r"model.layers.0.self_attn.q_proj": 2, r"layers\.[12]\.self_attn\.v_proj": 6, "down_proj": 3},
        "alpha_pattern": {"self_attn.q_proj": 7, r"^model\.layers\.1\.mlp\.down_proj": 5, r".*o_proj": 9},
    }
    folder = save_adapter(model, tmp_path / "a", use_rslora=stabilized, **patterns)
    file = LoraFile(folder)
    wrapped = peft.PeftModel.from_pretrained(model, folder)
    layers = {name: layer for name, layer in wrapped.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    assert layers.keys() == file.pairs.keys()
    assert len({pair.rank for pair in file.pairs.values()}) == 4
    for name, layer in layers.items():
        assert file.pairs[name].rank == layer.r["default"]
        assert file.config.scale_of(name) == pytest.approx(layer.scaling["default"], rel=1e-12)
        down, up = file.read(name)
        assert torch.equal(down, layer.lora_A["default"].weight)
        torch.testing.assert_close(up @ down, layer.get_delta_weight("default"))
    file.close()
    wrapped.unload()


def test_modules_that_a_checkpoint_stores_as_one(tmp_path):
    """Phi-3's qkv_proj and gate_up_proj: each product takes its rows of B."""
    model = random_model(CASES["phi3-window"]())
    folder = save_adapter(model, tmp_path / "a", targets=["qkv_proj", "gate_up_proj"])
    graph = graph_of(model)
    adapter = read_adapter(folder, graph, 64)
    assert len(adapter.pairs) == 5 * model.config.num_hidden_layers
    file = LoraFile(folder)
    for site, (down, up) in adapter.pairs.items():
        begin, end, total = graph.adapter_sites[site].rows
        whole = file.read(graph.adapter_sites[site].module)
        assert len(whole[1]) == total and torch.equal(up, whole[1][begin:end]) and torch.equal(down, whole[0])
    file.close()


def test_names_of_a_multimodal_model(tmp_path):
    """An adapter that was trained on the whole model names its language model's modules with a prefix."""
    model = random_model(CASES["qwen3_5_text-mixed"]())
    folder = save_adapter(model, tmp_path / "a", targets=["q_proj", "in_proj_qkv", "down_proj"])
    graph = graph_of(model)
    plain = read_adapter(folder, graph, 64)

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("model.model.layers", "model.model.language_model.layers")] = tensors.pop(name)

    change_tensors(folder, rename)
    renamed = read_adapter(folder, graph, 64)
    assert renamed.identity == plain.identity and renamed.pairs.keys() == plain.pairs.keys()


def test_the_identity_is_that_of_the_content(model, folder, tmp_path):
    graph = graph_of(model)
    again = save_adapter(model, tmp_path / "again")
    other = save_adapter(model, tmp_path / "other", lora_alpha=17)
    first = read_adapter(folder, graph, 64).identity
    assert read_adapter(again, graph, 64).identity == first != read_adapter(other, graph, 64).identity
    assert len(first) == 16


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, r"'use_dora' \(DoRA\)"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "'lora_bias'"),
        ({"modules_to_save": ["lm_head"]}, r"'modules_to_save' \(fully trained modules\) is \['lm_head'\], .*merge_and_unload"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        (
            {"target_parameters": ["mlp.experts.gate_up_proj"]},
            r"experts\) is \['mlp.experts.gate_up_proj'\], .*; merge",
        ),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"a_field_of_the_future": 1}, "'a_field_of_the_future' is 1, which is not supported; merge"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the model itself"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"rank_pattern": {"(a+)+": 3}}, "too complex"),
        ({"rank_pattern": {"a*b*c*": 3}}, "too complex"),
        ({"alpha_pattern": {"x" * 600: 3}}, "too complex"),
        ({"alpha_pattern": {"(": 3}}, "not a valid pattern"),
        ({"alpha_pattern": {"q_proj": "3"}}, "alpha_pattern"),
        ({"alpha_pattern": [1]}, "must map"),
    ],
)
def test_unsupported_settings(folder, fields, says):
    change_config(folder, **fields)
    with pytest.raises(AdapterError, match=says):
        LoraFile(folder)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(3)}), AdapterError, "DoRA"),
        (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(3)}), AdapterError, "a bias"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(3)}), AdapterError, "not a LoRA matrix"),
        (lambda t: t.update({"base_model.model.embed.lora_embedding_A": torch.ones(3)}), AdapterError, "an adapted embedding"),
        (lambda t: t.pop(f"{Q}.lora_A.weight"), CheckpointError, "only lora_B"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(5, 72)}), CheckpointError, "ranks 5 and 4"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4)}), CheckpointError, "must be a matrix"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 72, dtype=torch.int8)}), CheckpointError, "must be a matrix"),
        (lambda t: t[f"{Q}.lora_B.weight"].fill_(torch.nan), CheckpointError, "NaN"),
        (lambda t: t.clear(), AdapterError, "no LoRA matrices"),
    ],
)
def test_unsupported_tensors(model, folder, change, error, says):
    change_tensors(folder, change)
    with pytest.raises(error, match=says):
        read_adapter(folder, graph_of(model), 64)


def test_adapters_of_other_models(model, folder, tmp_path):
    other = random_model(llama(hidden_size=96, num_attention_heads=6))
    with pytest.raises(AdapterError, match="belongs to another model"):
        read_adapter(folder, graph_of(other), 64)
    small = random_model(llama(num_hidden_layers=1))
    with pytest.raises(AdapterError, match="has no such module"):
        read_adapter(folder, graph_of(small), 64)
    with pytest.raises(AdapterError, match="rank 4 .*max_lora_rank 3"):
        read_adapter(folder, graph_of(model), 3)


def test_a_module_that_is_not_supported(tmp_path):
    model = random_model(CASES["llama-tied"]())
    folder = save_adapter(model, tmp_path / "a", targets=["lm_head"])
    change_tensors(folder, lambda t: t.pop("base_model.model.lm_head.base_layer.weight", None))
    with pytest.raises(AdapterError, match=r"adapts 'lm_head', but this kind of module is not supported; merge"):
        read_adapter(folder, graph_of(model), 64)


def test_keys_and_values_of_latent_attention(tmp_path):
    """The matrices of every head multiply to its rows of B A."""
    model = random_model(CASES["deepseek_v3-groups"]())
    folder = save_adapter(model, tmp_path / "a", targets=["kv_b_proj"])
    graph = graph_of(model)
    adapter = read_adapter(folder, graph, 64)
    assert len(adapter.pairs) == 2 * model.config.num_hidden_layers
    file = LoraFile(folder)
    for site, (down, up) in adapter.pairs.items():
        latent = graph.adapter_sites[site].latent
        module_down, module_up = file.read(graph.adapter_sites[site].module)
        whole = (module_up @ module_down).unflatten(0, (latent.heads, latent.nope + latent.v_dim))
        rows = whole[:, : latent.nope].transpose(1, 2) if latent.keys else whole[:, latent.nope :]
        torch.testing.assert_close((up @ down).expand_as(rows), rows)
    file.close()


def test_an_adapted_head_is_saved_with_the_model_s_own(model, tmp_path):
    folder = save_adapter(model, tmp_path / "a", targets=["lm_head"])
    with pytest.raises(AdapterError, match="output head is adapted"):
        read_adapter(folder, graph_of(model), 64)


def test_missing_files(tmp_path, folder):
    with pytest.raises(CheckpointError):
        LoraFile(tmp_path / "none")
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="can run code"):
        LoraFile(folder)


def test_nothing_is_read_if_there_is_no_memory(model, folder):
    seen = []

    def refuse(ranks):
        seen.append(ranks)
        raise MemoryError

    change_tensors(folder, lambda tensors: [tensor.fill_(torch.nan) for tensor in tensors.values()])
    with pytest.raises(MemoryError):
        read_adapter(folder, graph_of(model), 64, refuse)
    assert set(seen[0].values()) == {4} and len(seen[0]) == 4 * model.config.num_hidden_layers


def test_a_pattern_counts_from_a_dot_on():
    config = LoraConfig(8, 16, {"proj": 2}, {"b.proj": 3})
    assert (config.rank_of("a.proj"), config.rank_of("a.q_proj"), config.rank_of("a.proj.x")) == (2, 8, 8)
    assert config.scale_of("a.b.proj") == 1.5 and config.scale_of("a.proj") == 8
