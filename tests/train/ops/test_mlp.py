"""mlp in one op: gradients against fp64, with saved and recomputed intermediates."""

import pytest
import torch

from deepseek_optimizer.train.ops import native
from deepseek_optimizer.train.ops.mlp import mlp, mlp_reference
from support.op_checks import against_fp64

needs_native = pytest.mark.skipif(not native.built(), reason="no native library on this machine")


def parts(*shape, dtype, width=40, out=None):
    H = shape[-1]
    weights = torch.randn(width, H) / H**0.5, torch.randn(width, H) / H**0.5, torch.randn(out or H, width) / width**0.5
    return tuple(t.to(dtype).requires_grad_() for t in (torch.randn(shape), *weights))


def test_gradients_of_the_reference():
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(mlp, parts(2, 3, 4, dtype=torch.float64, width=5))


@needs_native
@pytest.mark.parametrize("save_all", [False, True])
def test_native_equals_fp64_up_to_rounding(save_all):
    torch.manual_seed(1)
    for shape, width, out in (((1, 1), 1, 1), ((7, 33), 17, 5), ((2, 30, 64), 100, None)):
        against_fp64(
            lambda *t: mlp(*t, save_all=save_all), mlp_reference, parts(*shape, dtype=torch.float32, width=width, out=out)
        )


@needs_native
def test_bf16_is_as_close_to_fp64_as_torch():
    """Both round to bf16 between the products; ours rounds less often."""
    torch.manual_seed(2)
    ours = parts(200, 64, dtype=torch.bfloat16, width=160)
    errors = []
    exact = tuple(t.detach().double().requires_grad_() for t in ours)
    up = torch.randn(200, 64).bfloat16()
    right = torch.autograd.grad(mlp_reference(*exact), exact, up.double())
    for form in (mlp, mlp_reference):
        actual = torch.autograd.grad(form(*ours), ours, up)
        errors.append([(f.double() - r).norm() / r.norm() for f, r in zip(actual, right, strict=True)])
    assert all(a <= 1.1 * b and a < 2**-7 for a, b in zip(*errors, strict=True)), errors


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_changes_no_bit_and_backward_can_run_twice(dtype):
    torch.manual_seed(3)
    whole = parts(50, 64, dtype=dtype)
    actual = []
    for save_all in (False, True):
        y = mlp(*whole, save_all=save_all)
        for _ in range(2):
            actual.append((y, *torch.autograd.grad(y, whole, torch.ones_like(y), retain_graph=True)))
    assert all(torch.equal(a, b) for other in actual[1:] for a, b in zip(actual[0], other, strict=True))


@needs_native
def test_only_required_gradients_are_computed_and_go_to_main_grad():
    torch.manual_seed(4)
    whole = parts(50, 64, dtype=torch.bfloat16)
    right = torch.autograd.grad(mlp(*whole).sum(), whole)
    for wanted in range(4):
        some = tuple(t.detach().clone().requires_grad_(i == wanted) for i, t in enumerate(whole))
        if wanted:
            some[wanted].main_grad = torch.zeros(some[wanted].shape)
        mlp(*some).sum().backward()
        actual = some[wanted].main_grad.bfloat16() if wanted else some[0].grad
        assert torch.equal(actual, right[wanted]) and (not wanted or some[wanted].grad is None)


def test_mismatched_weights_are_rejected():
    x, gate, up, down = parts(3, 8, dtype=torch.float32)
    with pytest.raises((ValueError, RuntimeError)):
        mlp(x, gate, up[:7], down)
