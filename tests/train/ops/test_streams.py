"""Hyper-connections: values and gradients as in plain torch in fp64, for chunks of every size."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from deepseek_optimizer.train.ops import streams
from deepseek_optimizer.train.ops.streams import (
    doubly_stochastic,
    doubly_stochastic_reference,
    read,
    read_reference,
    write,
    write_reference,
)

SIZES = [(1, 1, 1, 1), (7, 2, 33, 1), (29, 3, 17, 2), (13, 4, 70, 6), (50, 5, 9, 20)]  # tokens, streams, width, steps


def tensors(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def in_fp64(leaves):
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def outcomes(function, leaves, seed=0):
    """The results, and the gradients of a random function of them."""
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    return [r.detach() for r in results], torch.autograd.grad(results, leaves, upstream)


def assert_same(function, reference, leaves, tolerance):
    for ours, exact in zip(outcomes(function, leaves), outcomes(reference, in_fp64(leaves)), strict=True):
        for actual, expected in zip(ours, exact, strict=True):
            off = (actual.double() - expected).norm()
            assert actual.shape == expected.shape and off <= tolerance * expected.norm().clamp(min=1e-3)


def weights(numbers, base, scale, count, steps):
    pre, post, comb = (numbers * scale.repeat_interleave(torch.tensor([count, count, count**2])) + base).split(
        [count, count, count**2], -1
    )
    return pre.sigmoid(), post.sigmoid(), doubly_stochastic(comb.unflatten(-1, (count, count)), steps, 1e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunk", [1, 100, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read(size, chunk, dtype, monkeypatch):
    monkeypatch.setattr(streams, "_CHUNK", chunk)
    tokens, count, width, steps = size
    (x,), numbers = tensors((tokens, count, width), dtype=dtype), count * (count + 2)
    rest = tensors((numbers, count * width), (numbers,), (3,))
    own = partial(weights, count=count, steps=steps)
    ours, reference = (lambda *leaves, function=function: function(*leaves, own, 1e-6) for function in (read, read_reference))
    assert_same(ours, reference, [x, *rest], 2e-5 if dtype == torch.float32 else 0.01)
    assert torch.equal(ours(x, *rest)[1], x)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunk", [1, 100, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write(size, chunk, dtype, monkeypatch):
    monkeypatch.setattr(streams, "_CHUNK", chunk)
    tokens, count, width, _ = size
    leaves = tensors((tokens, count, width), (tokens, width), dtype=dtype)
    leaves += tensors((tokens, count), (tokens, count, count))
    assert_same(write, write_reference, leaves, 1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("size", SIZES)
def test_doubly_stochastic(size):
    tokens, count, _, steps = size
    leaves = tensors((tokens, count, count))
    ours, reference = (
        lambda x, function=function: function(x, steps, 1e-3) for function in (doubly_stochastic, doubly_stochastic_reference)
    )
    assert_same(ours, reference, leaves, 1e-4)
    made = doubly_stochastic(leaves[0].detach(), 50, 0.0)
    assert (made.sum(1) - 1).abs().max() < 1e-5 and (made.sum(2) - 1).abs().max() < 1e-3


def test_no_tokens():
    x, matrix, base, scale = tensors((0, 2, 3), (8, 6), (8,), (3,))
    y, _, post, comb = read(x, matrix, base, scale, partial(weights, count=2, steps=2), 1e-6)
    write(x, y, post, comb).sum().backward()
    assert x.grad.shape == x.shape and not matrix.grad.any()
