"""Units that do nothing on the text are found, wherever they are, and the counts of what stays are checked."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer import load_model
from deepseek_optimizer.checkpoint import open_checkpoint
from deepseek_optimizer.errors import ConfigError, UnsupportedModelError
from deepseek_optimizer.prune.measure import choose_units, counts_of
from support.family_configs import deepseek_v3, gemma, llama, mixtral, qwen3


def chosen(folder, texts, layers, counts):
    model = load_model(folder, calibration=None)
    with open_checkpoint(folder) as checkpoint, torch.inference_mode():
        return choose_units(model, checkpoint, texts, layers, counts)


def test_weak_channels_and_heads_are_left_out(saved, texts):
    config = llama(num_attention_heads=6, num_key_value_heads=3, head_dim=16)
    weak = torch.arange(3, 136, 4)

    def weaken(model):
        for i, layer in enumerate(model.model.layers):
            layer.mlp.up_proj.weight[weak] *= 1e-3
            layer.self_attn.v_proj.weight[16 * i : 16 * (i + 1)] *= 1e-3  # another key head in each layer

    selection = chosen(saved(config, weaken), texts(config), (0, 2), {"mlp": 136 - len(weak), "heads": 2})
    assert selection.layers == (0, 2)
    others = tuple(j for j in range(136) if j not in weak.tolist())
    assert selection.kept["mlp"] == {0: others, 2: others}
    assert selection.kept["heads"] == {0: (1, 2), 2: (0, 1)}


def test_activations_are_those_without_the_layers_left_out(saved, texts):
    """Layer 0 writes only into channels that layer 1's heads then read: without layer 0, these heads read zeros."""
    config = llama(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    folder = saved(config)
    whole, alone = (chosen(folder, texts(config), layers, {"mlp": 96}).kept["mlp"][1] for layers in ((0, 1), (1,)))
    assert whole != alone


def test_heads_of_latent_attention(saved, texts):
    config = deepseek_v3()

    def weaken(model):
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, config.v_head_dim : 2 * config.v_head_dim] *= 1e-3

    selection = chosen(saved(config, weaken), texts(config), range(3), {"heads": 2})
    assert set(selection.kept["heads"].values()) == {(0, 2)}


def test_experts_that_are_chosen_least_are_left_out_of_each_group(saved, texts):
    config = deepseek_v3(n_routed_experts=9, n_group=3, topk_group=3, num_experts_per_tok=2)
    idle = torch.tensor([1, 5, 6])

    def discourage(model):
        for layer in model.model.layers[config.first_k_dense_replace :]:
            layer.mlp.gate.e_score_correction_bias.zero_()[idle] = -100.0

    selection = chosen(saved(config, discourage), texts(config), range(3), {"experts": 6})
    assert selection.kept["experts"] == {i: (0, 2, 3, 4, 7, 8) for i in range(config.first_k_dense_replace, 3)}


def test_counts_of_layers_and_units():
    config = deepseek_v3(n_routed_experts=12, n_group=3, topk_group=2, num_experts_per_tok=4)
    assert counts_of(config, {"depth": 0.3, "heads": 0.3, "experts": 0.25}) == {"depth": 2, "heads": 2, "experts": 9}
    assert counts_of(mixtral(), {"experts": 0.5}) == {"experts": 3}
    assert counts_of(llama(), {"mlp": 0.25}) == {"mlp": 96}


@pytest.mark.parametrize(
    "config, fractions, error, message",
    [
        (lambda: deepseek_v3(n_routed_experts=12, topk_group=2, num_experts_per_tok=4), {"experts": 0.7}, ConfigError,
         "experts: 3 would stay, but the router needs 6 to choose 4 for each token"),
        (lambda: mixtral(num_local_experts=3), {"experts": 0.6}, ConfigError, "1 would stay, but the router needs 2"),
        (qwen3, {"experts": 0.5}, UnsupportedModelError, "experts: cannot be pruned in models of type qwen3"),
        (mixtral, {"mlp": 0.5}, UnsupportedModelError, "possible are depth, heads, experts"),
        (gemma, {"mlp": 0.5}, UnsupportedModelError, "models of type gemma cannot be pruned; supported are llama"),
    ],
)  # fmt: skip
def test_what_is_not_possible_is_refused(config, fractions, error, message):
    with pytest.raises(error, match=message):
        counts_of(config(), fractions)
