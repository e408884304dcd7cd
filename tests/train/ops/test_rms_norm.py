"""RMS norm in training: gradients of the reference, the native form against fp64."""

import pytest
import torch

from deepseek_optimizer.train.ops import native
from deepseek_optimizer.train.ops.rms_norm import (
    rms_norm,
    rms_norm_of_dtype,
    rms_norm_reference,
    rms_norm_with_residual,
)
from support.op_checks import against_fp64, contiguous_and_not

needs_native = pytest.mark.skipif(not native.built(), reason="no native library on this machine")
EPS = 1e-5


def alone(x, weight):
    return rms_norm(x, weight, EPS)


def test_gradients_of_the_reference():
    torch.manual_seed(0)
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 7), (7,)))
    assert torch.autograd.gradcheck(alone, (x, weight))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_equals_fp64_up_to_rounding(dtype):
    torch.manual_seed(1)
    for rows, n in ((1, 2), (3, 7), (5, 16), (33, 40), (70, 64), (1000, 96), (19, 577)):
        for x in contiguous_and_not(torch.randn(rows, n).to(dtype)):
            against_fp64(alone, lambda x, w: rms_norm_reference(x, w, EPS), (x, torch.randn(n).to(dtype)))


@needs_native
def test_frozen_weights_and_empty_batches():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    rms_norm(x, weight, EPS).sum().backward()
    assert x.grad is not None and weight.grad is None
    nothing, weight = torch.randn(0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    rms_norm(nothing, weight, EPS).sum().backward()
    assert nothing.grad.shape == (0, 8) and not weight.grad.any()


def test_non_finite_values_stay_in_their_row():
    x = torch.ones(3, 32)
    x[1, 5] = float("nan")
    y = rms_norm(x, torch.ones(32), EPS)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_a_weight_of_another_dtype_uses_the_reference():
    assert rms_norm(torch.randn(3, 8).bfloat16(), torch.ones(8), EPS).dtype == torch.float32


@pytest.mark.parametrize("native_form", [pytest.param(True, marks=needs_native), False])
def test_a_result_of_the_dtype_of_x(native_form, monkeypatch):
    """The weight and its gradient are fp32."""
    monkeypatch.setattr(native, "usable", native.usable if native_form else lambda *_: False)
    torch.manual_seed(2)
    for rows, n in ((1, 2), (33, 40), (19, 577)):
        x, weight = torch.randn(rows, n).bfloat16().requires_grad_(), torch.randn(n).requires_grad_()
        upstream = torch.randn(rows, n).bfloat16()
        y = rms_norm_of_dtype(x, weight, EPS)
        made = (y, *torch.autograd.grad(y, (x, weight), upstream))
        leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
        y = rms_norm_reference(*leaves, EPS)
        for actual, expected in zip(made, (y, *torch.autograd.grad(y, leaves, upstream.double())), strict=True):
            bound = 1e-5 if actual.dtype == torch.float32 else 5e-3
            assert (actual.double() - expected).norm() <= bound * expected.norm()
        assert made[0].dtype == torch.bfloat16 and made[2].dtype == torch.float32


def test_mismatched_shapes_are_named():
    with pytest.raises(ValueError, match="weight"):
        rms_norm(torch.ones(2, 8), torch.ones(7), EPS)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_with_residual_has_the_gradients_of_both_results(dtype):
    torch.manual_seed(5)
    for x in contiguous_and_not(torch.randn(33, 40).to(dtype)):
        actual = []
        for form in (lambda x, w: rms_norm_with_residual(x, w, EPS), lambda x, w: (rms_norm(x, w, EPS), x)):
            one, weight = x.detach().clone().requires_grad_(), torch.ones(40).to(dtype).requires_grad_()
            y, same = form(one * 1, weight)
            assert torch.equal(same, one)
            (y * 3 + same * 2).sum().backward()
            actual.append((y, one.grad, weight.grad))
        assert all(torch.equal(a, b) for a, b in zip(*actual, strict=True))
