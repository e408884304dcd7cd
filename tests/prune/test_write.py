"""Pruned checkpoints: what does nothing can be left out without changing the results, and all else is kept bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from deepseek_optimizer.checkpoint import open_checkpoint
from deepseek_optimizer.errors import CheckpointError, ConfigError
from deepseek_optimizer.prune.families import FAMILIES
from deepseek_optimizer.prune.selection import Selection
from deepseek_optimizer.prune.write import pruned_config, write_pruned
from support.family_configs import deepseek_v3, llama, mistral, mixtral, qwen2, qwen3, smollm3

CONFIGS = {
    "llama": lambda: llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "qwen2": lambda: qwen2(use_sliding_window=True, sliding_window=11, max_window_layers=1),
    "qwen3": qwen3,
    "mistral": lambda: mistral(sliding_window=13),
    "smollm3": lambda: smollm3(no_rope_layers=[1, 1, 0, 1]),
    "mixtral": mixtral,
    "deepseek_v3": deepseek_v3,
}


def write(source, folder, selection, **options):
    folder.mkdir()
    with open_checkpoint(source) as checkpoint:
        write_pruned(checkpoint, AutoConfig.from_pretrained(source), selection, folder, **options)
    return folder


def silence(layer):
    layer.self_attn.o_proj.weight.zero_()
    for name, parameter in layer.mlp.named_parameters():
        if "down_proj" in name:
            parameter.zero_()
    for name, parameter in layer.named_parameters():
        if name.endswith("bias") and ("o_proj" in name or "down_proj" in name):
            parameter.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_without_effect_can_be_left_out(saved, logits, tmp_path, family):
    config = CONFIGS[family]()
    source = saved(config, lambda model: silence(model.model.layers[1]))
    layers = tuple(i for i in range(config.num_hidden_layers) if i != 1)
    folder = write(source, tmp_path / "pruned", Selection(layers))
    assert torch.equal(logits(folder), logits(source))
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == len(layers)


def dead_channels_and_heads(model):
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, 96:] = 0
        layer.self_attn.o_proj.weight[:, 32:] = 0


@pytest.mark.parametrize("family", [family for family, widths in FAMILIES.items() if widths[0].kind == "mlp"])
def test_dead_channels_and_heads_change_nothing_to_the_bit(saved, logits, tmp_path, family):
    """Integer products add the groups of 32 columns in order, so that groups of zeros at the end change no bit."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = CONFIGS[family]()
    source = saved(type(config)(**{**config.to_dict(), **sizes}), dead_channels_and_heads)
    layers = range(config.num_hidden_layers)
    kept = {"mlp": dict.fromkeys(layers, tuple(range(96))), "heads": dict.fromkeys(layers, (0,))}
    folder = write(source, tmp_path / "pruned", Selection(tuple(layers), kept))
    assert torch.equal(logits(folder, "int8"), logits(source, "int8"))
    written = json.loads((folder / "config.json").read_text())
    counts = {"intermediate_size": 96, "num_key_value_heads": 1, "num_attention_heads": 2, "head_dim": 16}
    assert counts.items() <= written.items()


def test_dead_heads_of_latent_attention_change_nothing_to_the_bit(saved, logits, tmp_path):
    config = deepseek_v3(num_attention_heads=4, num_key_value_heads=4, v_head_dim=32)

    def kill(model):
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, 96:] = 0

    source = saved(config, kill)
    kept = {"heads": dict.fromkeys(range(3), (0, 1, 2))}
    folder = write(source, tmp_path / "pruned", Selection((0, 1, 2), kept))
    assert torch.equal(logits(folder, "int8"), logits(source, "int8"))


def test_experts_that_are_never_chosen_change_nothing_to_the_bit(saved, logits, tmp_path):
    config = deepseek_v3(n_routed_experts=9, n_group=3, topk_group=2, num_experts_per_tok=2)
    idle = (2, 3, 7)

    def discourage(model):
        for layer in model.model.layers[config.first_k_dense_replace :]:
            layer.mlp.gate.e_score_correction_bias[torch.tensor(idle)] = -100.0

    source = saved(config, discourage)
    others = tuple(i for i in range(9) if i not in idle)
    kept = {"experts": dict.fromkeys(range(config.first_k_dense_replace, 3), others)}
    folder = write(source, tmp_path / "pruned", Selection((0, 1, 2), kept))
    assert torch.equal(logits(folder, "int8"), logits(source, "int8"))
    torch.testing.assert_close(logits(folder), logits(source))  # torch computes a router of six rows in another way


def test_mixtral_without_an_expert_that_is_never_chosen(saved, logits, tmp_path):
    """The router's softmax runs over all experts, so that the weights of those chosen are rounded in another way."""
    config = mixtral(num_local_experts=4, num_experts_per_tok=1)

    def average(model):  # never the largest
        for layer in model.model.layers:
            layer.mlp.gate.weight[1] = (layer.mlp.gate.weight[0] + layer.mlp.gate.weight[3]) / 2

    source = saved(config, average)
    folder = write(source, tmp_path / "pruned", Selection((0, 1, 2), {"experts": dict.fromkeys(range(3), (0, 2, 3))}))
    torch.testing.assert_close(logits(folder), logits(source), rtol=1e-5, atol=1e-5)


def test_units_that_stay_are_kept_bit_for_bit_in_any_order_of_layers(saved, tmp_path):
    config = qwen2(num_attention_heads=6, num_key_value_heads=3, hidden_size=72)
    source = saved(config)
    selection = Selection((0, 2), {"mlp": {0: (1, 5, 7), 2: (0, 130, 135)}, "heads": {0: (0, 2), 2: (1, 2)}})
    written = load_file(write(source, tmp_path / "pruned", selection) / "model.safetensors")
    stored = load_file(source / "model.safetensors")
    heads = [12 * i + j for i in (1, 2) for j in range(12)]  # the key heads of layer 2
    queries = [24 * i + j for i in (1, 2) for j in range(24)]
    before, after = "model.layers.2.", "model.layers.1."
    assert torch.equal(written[after + "mlp.up_proj.weight"], stored[before + "mlp.up_proj.weight"][[0, 130, 135]])
    assert torch.equal(written[after + "mlp.down_proj.weight"], stored[before + "mlp.down_proj.weight"][:, [0, 130, 135]])
    assert torch.equal(written[after + "self_attn.k_proj.bias"], stored[before + "self_attn.k_proj.bias"][heads])
    assert torch.equal(written[after + "self_attn.q_proj.weight"], stored[before + "self_attn.q_proj.weight"][queries])
    assert torch.equal(written[after + "self_attn.o_proj.weight"], stored[before + "self_attn.o_proj.weight"][:, queries])
    assert torch.equal(written["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert not any(name.startswith("model.layers.2.") for name in written)


def test_large_models_are_written_in_several_files(saved, logits, tmp_path):
    source = saved(mixtral(), lambda model: silence(model.model.layers[0]))
    folder = write(source, tmp_path / "pruned", Selection((1, 2)), shard_bytes=100_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and (folder / "model.safetensors.index.json").exists()
    assert torch.equal(logits(folder), logits(source))


def test_lists_with_an_entry_for_each_layer_are_cut():
    config = smollm3(use_sliding_window=True, sliding_window=9, no_rope_layers=[1, 0, 0, 1])
    pruned = pruned_config(config, Selection((0, 2)))
    assert pruned.no_rope_layers == [1, 0] and len(pruned.layer_types) == 2
    assert pruned_config(deepseek_v3(first_k_dense_replace=2), Selection((1, 2))).first_k_dense_replace == 1
    assert config.no_rope_layers == [1, 0, 0, 1]


def test_a_number_of_heads_that_transformers_refuses():
    config = llama(num_attention_heads=8, num_key_value_heads=8, hidden_size=64)
    with pytest.raises(ConfigError, match="Transformers refuses the config.*hidden size.*use another fraction"):
        pruned_config(config, Selection((0, 1, 2), {"heads": {0: (0, 1, 2)}}))


def test_a_tensor_of_another_shape_is_refused(saved, tmp_path):
    config = llama()
    source = saved(config)
    config.intermediate_size = 100
    (tmp_path / "pruned").mkdir()
    with open_checkpoint(source) as checkpoint, pytest.raises(CheckpointError, match="not a multiple of 100"):
        write_pruned(checkpoint, config, Selection((0,), {"mlp": {0: (1, 2)}}), tmp_path / "pruned")
