"""Sums in training: bitwise equal to torch's, for all operands."""

import pytest
import torch

from deepseek_optimizer.train.ops.add import add


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bits_and_gradients_equal_torch(dtype):
    torch.manual_seed(0)
    big = torch.randn(400, 700)  # in the memory of a step's tensors
    for a, b in ((big, big.flip(0)), (big[:3], big[3:6]), (big.t(), big.t() * 2), (big, big[0]), (big[:0], big[:0])):
        a, b = (t.to(dtype).detach().requires_grad_() for t in (a, b))
        actual = add(a, b)
        assert torch.equal(actual, a + b) and actual.dtype == dtype
        upstream = torch.randn(actual.shape).to(dtype)
        expected = torch.autograd.grad(a + b, (a, b), upstream)
        assert all(map(torch.equal, torch.autograd.grad(actual, (a, b), upstream), expected))
