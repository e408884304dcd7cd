"""Grouped experts: against a sum over experts in fp64, against Transformers' forward, and a fixed order of sums."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from deepseek_optimizer.train.modules.experts import TrainedExperts, grouped_experts
from deepseek_optimizer.train.saved_activations import SavedActivations
from support.family_configs import deepseek_v2, deepseek_v3, deepseek_v4, deepseek_v32, llama, llama4_text, youtu
from support.models import random_model

FAMILIES = {"v2": deepseek_v2, "v3": deepseek_v3, "v32": deepseek_v32, "v4": deepseek_v4}


def trained(module: torch.nn.Module) -> torch.nn.Module:
    twin = copy.deepcopy(module)
    twin.__class__ = type("Trained", (TrainedExperts, type(module)), {})
    return twin


def one_by_one(x, gate_up, down, index, weights):
    """A sum over tokens and experts, by the formula."""
    out = torch.zeros_like(x)
    rows = []
    for t in range(len(x)):
        row = out[t]
        for e, w in zip(index[t].tolist(), weights[t], strict=True):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            row = row + w * (down[e] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def case(tokens: int, experts: int, chosen: int, dtype: torch.dtype, seed: int = 0, only: int | None = None):
    g = torch.Generator().manual_seed(seed)
    hidden, inner = 24, 10
    scores = torch.rand(tokens, experts, generator=g)
    if only is not None:
        scores[:, only:] = -1  # experts that no token chooses
    index = scores.topk(chosen, -1, sorted=False).indices
    tensors = (
        torch.randn(tokens, hidden, generator=g),
        torch.randn(experts, 2 * inner, hidden, generator=g) * hidden**-0.5,
        torch.randn(experts, hidden, inner, generator=g) * inner**-0.5,
        torch.rand(tokens, chosen, generator=g),
    )
    x, gate_up, down, weights = (t.to(dtype).requires_grad_() for t in tensors)
    return x, gate_up, down, index, weights


@pytest.mark.parametrize("limit", [None, 0.4])
def test_gradients_in_fp64(limit):
    x, gate_up, down, index, weights = case(5, 6, 3, torch.float64, only=4)
    assert torch.autograd.gradcheck(
        lambda a, b, c, w: grouped_experts(a, b, c, index, w, limit=limit), (x, gate_up, down, weights)
    )


@pytest.mark.parametrize("tokens, experts, chosen, only", [(1, 4, 1, None), (7, 3, 3, None), (33, 16, 4, 5), (64, 8, 2, None)])
def test_equals_the_sum_over_experts(tokens, experts, chosen, only):
    made = case(tokens, experts, chosen, torch.float32, seed=tokens, only=only)
    exact = case(tokens, experts, chosen, torch.float64, seed=tokens, only=only)
    out, expected = grouped_experts(*made), one_by_one(*exact)
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(toward)
    expected.backward(toward.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(made, exact, strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-5)


def test_bf16_is_close():
    made, exact = case(40, 8, 3, torch.bfloat16), case(40, 8, 3, torch.bfloat16)
    exact = tuple(t.detach().double().requires_grad_() if t.requires_grad else t for t in exact)
    out, expected = grouped_experts(*made), one_by_one(*exact)
    out.backward(torch.ones_like(out))
    expected.backward(torch.ones_like(expected))
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(made, exact, strict=True) if a.requires_grad)]
    for a, b in pairs:  # a few roundings to bf16
        assert (a.double() - b).norm() < 0.02 * b.norm()


class CountingActivations(SavedActivations):
    """Counts the bytes that are recomputed instead of saved."""

    bytes_recomputed = 0

    def _pack(self, tensor):
        packed = super()._pack(tensor)
        self.bytes_recomputed += 0 if isinstance(packed, torch.Tensor) else tensor.nbytes
        return packed


def test_recomputed_equals_saved():
    """For each chosen row, only the outputs of gate and up are saved, not the row or the input of `down`."""
    results = []
    for save_all in (True, False):
        x, gate_up, down, index, weights = case(40, 8, 4, torch.float32)
        saved = CountingActivations(save_all)
        with saved:
            out = grouped_experts(x, gate_up, down, index, weights, saved)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, gate_up, down, weights))))
        assert saved.bytes_recomputed == (0 if save_all else 40 * 4 * (24 + 10) * 4)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_sums_do_not_depend_on_the_order_of_names():
    x, gate_up, down, index, weights = case(30, 8, 4, torch.float32)
    swap = torch.tensor([2, 0, 3, 1])
    results = []
    for i, w in ((index, weights), (index[:, swap], weights[:, swap])):
        out = grouped_experts(x, gate_up, down, i, w)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, gate_up, down))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family, dtype, tolerance):
    own = random_model(FAMILIES[family](), dtype=dtype).model.layers[-1].mlp.experts
    assert TrainedExperts.fits(own)
    ours = trained(own)
    assert isinstance(ours, type(own))
    assert list(ours.state_dict()) == list(own.state_dict())
    g = torch.Generator().manual_seed(3)
    index = torch.rand(50, own.num_experts, generator=g).topk(3, -1).indices
    inputs = [torch.randn(50, own.hidden_dim, generator=g).to(dtype), torch.rand(50, 3, generator=g).to(dtype)]
    made = []
    for module in (ours, own):
        x, w = (t.clone().requires_grad_() for t in inputs)
        out = module(x, index, w)
        out.square().sum().backward()
        made.append((out, x.grad, w.grad, module.gate_up_proj.grad, module.down_proj.grad))
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_limits_change_the_result():
    own = random_model(deepseek_v4()).model.layers[-1].mlp.experts
    x, index, weights = torch.randn(9, own.hidden_dim), torch.arange(9)[:, None] % 6, torch.ones(9, 1)
    with torch.no_grad():
        first = trained(own)(x, index, weights)
        own.limit = 1e9
        assert not torch.allclose(trained(own)(x, index, weights), first)


def test_unsupported_modules():
    layer = random_model(deepseek_v3()).model.layers[-1]
    assert not TrainedExperts.fits(layer.mlp)
    assert not TrainedExperts.fits(layer.mlp.shared_experts)
    assert not any(
        TrainedExperts.fits(m) for config in (llama(), youtu(), llama4_text()) for m in random_model(config).modules()
    )
    layer.mlp.experts._is_expert_parallel = True
    assert not TrainedExperts.fits(layer.mlp.experts)
    gelu = random_model(deepseek_v3(hidden_act="gelu")).model.layers[-1].mlp.experts
    assert not TrainedExperts.fits(gelu)
