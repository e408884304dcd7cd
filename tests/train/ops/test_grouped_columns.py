"""Products of groups of columns: values and gradients as in plain torch in fp64."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.train.ops.grouped_columns import grouped_columns, grouped_columns_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (7, 3, 20, 14), (33, 2, 9, 40)])
def test_equals_fp64(size, dtype):
    tokens, groups, width, made = size
    generator = torch.Generator().manual_seed(sum(size))
    shapes = ((2, tokens, groups, width), (groups * made, width), (2, tokens, groups, made))
    x, weight, upstream = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    results = grouped_columns(*leaves), grouped_columns_reference(*exact)
    ours = (results[0], *torch.autograd.grad(results[0], leaves, upstream, retain_graph=True))
    theirs = (results[1], *torch.autograd.grad(results[1], exact, upstream.double()))
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == dtype and (actual.double() - expected).norm() <= tolerance * expected.norm()
    weight.main_grad = torch.ones(weight.shape)
    results[0].backward(upstream)
    assert weight.grad is None
    assert (weight.main_grad - 1 - theirs[2]).norm() <= tolerance * theirs[2].norm()


def test_frozen_weights():
    x, weight = torch.randn(5, 2, 8, requires_grad=True), torch.randn(6, 8)
    grouped_columns(x, weight).sum().backward()
    assert torch.allclose(x.grad, weight.view(2, 3, 8).sum(1).expand(5, 2, 8), atol=1e-5)
