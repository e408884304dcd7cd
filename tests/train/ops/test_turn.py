"""RoPE of the last elements of heads, and with a norm: values and gradients as in plain torch in fp64."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.train.ops import turn as module
from deepseek_optimizer.train.ops.turn import normed_and_turned, normed_and_turned_reference, turn, turn_reference

SIZES = [(1, 1, 1, 2, 2), (2, 13, 3, 20, 6), (3, 7, 5, 18, 18)]  # sequences, tokens, heads, width, turned elements


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["own angles", "shared angles"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_equals_fp64(size, dtype, shared, normed, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    batch, tokens, heads, width, turned = size
    generator = torch.Generator().manual_seed(sum(size))
    x, upstream = (torch.randn(batch, tokens, heads, width, generator=generator).to(dtype) for _ in range(2))
    angles = torch.rand(1 if shared else batch, tokens, turned // 2, generator=generator) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    ours, reference = (normed_and_turned, normed_and_turned_reference) if normed else (turn, turn_reference)
    eps = (1e-6,) if normed else ()
    leaves = x.requires_grad_(), x.detach().double().requires_grad_()
    results = ours(leaves[0], cos, sin, *eps), reference(leaves[1], cos.double(), sin.double(), *eps)
    made = (results[0], *torch.autograd.grad(results[0], leaves[0], upstream))
    exact = (results[1], *torch.autograd.grad(results[1], leaves[1], upstream.double()))
    for actual, expected in zip(made, exact, strict=True):
        assert actual.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.01
        assert (actual.double() - expected).norm() <= tolerance * upstream.double().norm()


def test_turned_back():
    x, angles = torch.randn(2, 5, 3, 10), torch.rand(2, 5, 2)
    turned = turn(x, angles.cos(), angles.sin())
    assert torch.equal(turned[..., :6], x[..., :6]) and not torch.allclose(turned, x)
    assert torch.allclose(turn(turned, angles.cos(), -angles.sin()), x, atol=1e-5)
