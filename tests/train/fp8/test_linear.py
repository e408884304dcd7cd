"""FP8 layers: gradients against their definition, which tensors get one, and what is rejected."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.train.fp8.backend import Fp8Products
from deepseek_optimizer.train.fp8.linear import fp8_grouped_linear, fp8_linear
from deepseek_optimizer.train.fp8.quantize import E5M2

HOW = Fp8Products(E5M2)


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().requires_grad_()


@pytest.mark.parametrize("lead", [(7,), (2, 65), ()])
def test_gradients(lead) -> None:
    x, w, b = made(*lead, 150), made(130, 150, seed=1), made(130, seed=2)
    y = fp8_linear(x, w, b, HOW)
    dy = made(*y.shape, seed=3).detach()
    y.backward(dy)
    rows, drows = x.detach().reshape(-1, 150), dy.reshape(-1, 130)
    assert torch.equal(y.detach().reshape(-1, 130), HOW.forward(rows, w.detach(), b.detach()))
    assert torch.equal(x.grad.reshape(-1, 150), HOW.input_gradient(drows, w.detach()))
    assert torch.equal(w.grad, HOW.weight_gradient(drows, rows))
    torch.testing.assert_close(b.grad.float(), drows.float().sum(0), rtol=1e-2, atol=1e-2)
    exact = rows.float() @ w.detach().float().t() + b.detach().float()
    assert 0.001 < ((y.detach().reshape(-1, 130).float() - exact).norm() / exact.norm()) < 0.06, "close, but not bf16"


def test_main_grad_gets_the_gradient() -> None:
    x, w = made(40, 64), made(48, 64, seed=1)
    w.main_grad = torch.ones(48, 64)
    fp8_linear(x, w, None, HOW).backward(made(40, 48, seed=2).detach())
    assert w.grad is None
    expected = HOW.weight_gradient(made(40, 48, seed=2).detach(), x.detach(), out=torch.ones(48, 64), add=True)
    assert torch.equal(w.main_grad, expected) and not torch.equal(w.main_grad, torch.ones(48, 64))


def test_only_required_gradients_are_computed() -> None:
    x, w = made(5, 32).detach(), made(16, 32, seed=1)
    fp8_linear(x, w, None, HOW).sum().backward()
    assert w.grad is not None and x.grad is None
    x, w = made(5, 32), made(16, 32, seed=1).detach()
    fp8_linear(x, w, None, HOW).sum().backward()
    assert x.grad is not None and w.grad is None


def test_groups_are_separate_layers() -> None:
    """Including groups without rows; no tile of the weight's gradient has rows of two groups."""
    x, w = made(200, 96), made(4, 72, 96, seed=1)
    offsets = torch.tensor([0, 50, 50, 130, 200])
    y = fp8_grouped_linear(x, w, offsets, HOW)
    dy = made(200, 72, seed=2).detach()
    y.backward(dy)
    for e, (a, b) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        if a == b:
            assert not w.grad[e].any()
            continue
        alone, weight = x.detach()[a:b].clone().requires_grad_(), w.detach()[e].clone().requires_grad_()
        part = fp8_linear(alone, weight, None, HOW)
        part.backward(dy[a:b])
        assert torch.equal(part, y[a:b]) and torch.equal(alone.grad, x.grad[a:b])
        assert torch.equal(weight.grad, w.grad[e])


def test_groups_add_to_main_grad() -> None:
    x, w = made(20, 32), made(2, 16, 32, seed=1)
    w.main_grad = torch.zeros(2, 16, 32)
    fp8_grouped_linear(x, w, torch.tensor([0, 20, 20]), HOW).sum().backward()
    assert w.grad is None and w.main_grad[0].abs().sum() > 0 and not w.main_grad[1].any()


def test_wrong_shapes_are_rejected() -> None:
    with pytest.raises(ValueError, match="fp8_linear.*last dimensions"):
        fp8_linear(made(2, 3), made(4, 5), None, HOW)
    with pytest.raises(ValueError, match="fp8_grouped_linear.*ascend"):
        fp8_grouped_linear(made(4, 3), made(2, 5, 3), torch.tensor([0, 3, 2]), HOW)
