"""The starting weights of a layer that drafts: the least squares solution, and a better layer than a random one."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.train.modules.draft_fit import fit_draft_layer
from deepseek_optimizer.train.modules.draft_layer import add_draft_layer
from support.family_configs import deepseek_v3, llama, qwen3
from support.models import random_ids, random_model

CONFIGS = {"llama": llama, "qwen3": qwen3, "v3": lambda: deepseek_v3(num_nextn_predict_layers=1)}


@pytest.fixture(params=CONFIGS)
def model(request):
    made = random_model(CONFIGS[request.param]()).train()
    made.set_attn_implementation("sdpa")
    add_draft_layer(made)
    return made


def batch(model, seed):
    """Two texts in a row, and a row that ends with padding."""
    ids = torch.tensor([random_ids(model.config, 40, seed), random_ids(model.config, 40, seed + 1)])
    positions = torch.stack((torch.cat((torch.arange(25), torch.arange(15))), torch.arange(40)))
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


@torch.no_grad()
def rows(model, batches):
    """Inputs and target of the regression, token by token."""
    layer = model.model.layers[model.config.num_hidden_layers]
    x, y = [], []
    for each in batches:
        output = model.eval().model(
            input_ids=each["input_ids"], position_ids=each["position_ids"], use_cache=False, output_hidden_states=True
        )
        for b, i in ((b, i) for b in range(2) for i in range(1, 40)):
            if each["position_ids"][b, i] > 0:
                embedded = layer.enorm(model.model.embed_tokens(each["input_ids"][b, i]))
                x.append(torch.cat((embedded, layer.hnorm(output.last_hidden_state[b, i - 1]))))
                y.append(output.hidden_states[-2][b, i])
    return torch.stack(x).double(), torch.stack(y).double()


@pytest.mark.parametrize("massive", [False, True])
def test_projection_is_the_least_squares_solution(model, massive):
    """Tokens with massive activations are left out."""
    if massive:
        with torch.no_grad():
            model.model.embed_tokens.weight[5:15] *= 1000
    batches = [batch(model, seed) for seed in range(0, 40, 2)]
    per_batch = [rows(model, [each]) for each in batches]
    usual = [y.norm(dim=-1) < 4 * y.norm(dim=-1).median() for _, y in per_batch]
    x, y = (torch.cat([part[i][keep] for part, keep in zip(per_batch, usual, strict=True)]) for i in (0, 1))
    assert all(keep.all() for keep in usual) != massive
    read = iter(batches)
    assert fit_draft_layer(model.train(), read, tokens=len(x) - 10) and model.training
    assert next(read, None) is None  # all were needed
    layer = model.model.layers[model.config.num_hidden_layers]
    ridge = 1e-3 * (x * x).sum(0).mean()  # rows of the identity as further equations
    a = torch.cat((x, ridge.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)))
    expected = torch.linalg.lstsq(a, torch.cat((y, torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)))).solution
    torch.testing.assert_close(layer.eh_proj.weight.double(), expected.T, rtol=1e-4, atol=1e-5)
    last = model.model.layers[model.config.num_hidden_layers - 1].state_dict()
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in last.items())
    assert torch.equal(layer.shared_head.norm.weight, model.model.norm.weight)


def test_enough_tokens_end_it(model):
    read = iter([batch(model, 0), batch(model, 2), batch(model, 4)])
    assert fit_draft_layer(model, read, tokens=78)
    assert next(read)["labels"].equal(batch(model, 4)["input_ids"])


def test_a_layer_of_another_shape_stays_as_it_is():
    model = random_model(deepseek_v3(num_nextn_predict_layers=1, first_k_dense_replace=3))  # the last layer has no experts
    add_draft_layer(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not fit_draft_layer(model, iter(()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
