"""Layers are left out one after the other, by the measured divergence without each."""

from __future__ import annotations

import torch

from deepseek_optimizer import load_model
from deepseek_optimizer.prune.depth import leave_out_layers
from deepseek_optimizer.prune.layerwise import Layerwise
from support.family_configs import llama, smollm3
from support.models import random_model


def without_effect(layer):
    """Makes a layer return its input."""
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()


def test_a_layer_without_effect_is_left_out_first(saved, texts):
    config = smollm3(num_hidden_layers=5)
    model = load_model(saved(config, lambda m: without_effect(m.model.layers[2])), calibration=None)
    done = []
    with torch.inference_mode():
        left_out = leave_out_layers(Layerwise(model, texts(config)), 2, lambda *counts: done.append(counts))
    assert left_out[0].layer == 2 and left_out[0].kl == 0
    assert left_out[1].layer != 2 and left_out[1].kl > 0
    assert done[-1] == (8, 8) and len(done) == 8  # five layers tried, then three of the best four


@torch.no_grad()
def divergence_without(model, layers, texts):
    """The same by Transformers, without the layers."""
    whole = [model(ids, use_cache=False).logits[0].log_softmax(-1) for ids in texts]
    every = model.model.layers
    model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(every) if i not in layers)
    model.model.config.num_hidden_layers = len(model.model.layers)
    pruned = [model(ids, use_cache=False).logits[0].log_softmax(-1) for ids in texts]
    model.model.layers, model.model.config.num_hidden_layers = every, len(every)
    return torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(whole, pruned, strict=True)]).mean()


def test_the_divergence_is_that_of_the_model_without_the_layers(saved, texts):
    config = llama(num_hidden_layers=4)
    model, ids = load_model(saved(config), calibration=None), texts(config)
    with torch.inference_mode():
        first, second = leave_out_layers(Layerwise(model, ids), 2)
    plain = random_model(config)
    singles = torch.stack([divergence_without(plain, {i}, ids) for i in range(4)])
    assert first.layer == int(singles.argmin())
    assert abs(first.kl - singles.min()) < 1e-4 * singles.min()
    both = divergence_without(plain, {first.layer, second.layer}, ids)
    assert abs(second.kl - both) < 1e-4 * both
    others = [divergence_without(plain, {first.layer, i}, ids) for i in range(4) if i != first.layer]
    assert both == min(others)


def test_distributions_at_some_tokens(saved, texts):
    config = llama()
    model, ids = load_model(saved(config), calibration=None), texts(config)
    with torch.inference_mode():
        whole, some = (Layerwise(model, ids, every) for every in (1, 3))
        for a, b in zip(*(side.log_probabilities(side.inputs) for side in (whole, some)), strict=True):
            assert torch.equal(a[2::3], b) and len(b) == 13
