"""linear in training: gradients against fp64, which tensors get one, and other features of autograd."""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from deepseek_optimizer.train.ops import native
from deepseek_optimizer.train.ops.linear import linear, linear_reference, linears
from support.op_checks import against_fp64

needs_native = pytest.mark.skipif(not native.built(), reason="no native library on this machine")
DTYPES = (torch.float32, torch.bfloat16)


def parts(*shape, dtype, N=48, bias=True):
    K = shape[-1]
    x, weight = torch.randn(shape).to(dtype), (torch.randn(N, K) / K**0.5).to(dtype)
    return tuple(t.requires_grad_() for t in ((x, weight, torch.randn(N).to(dtype)) if bias else (x, weight)))


def test_gradients_of_the_reference():
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(linear, parts(2, 3, 5, dtype=torch.float64, N=4))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_native_equals_fp64_up_to_rounding(dtype, bias):
    torch.manual_seed(1)
    for shape, N in (((1, 1), 1), ((7, 33), 5), ((2, 3, 64), 31), ((2, 150, 100), 70), ((0, 8), 3)):
        against_fp64(linear, linear_reference, parts(*shape, dtype=dtype, N=N, bias=bias))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_required_gradients_are_computed(dtype):
    torch.manual_seed(2)
    whole = parts(30, 64, dtype=dtype)
    linear(*whole).sum().backward()
    for wanted in range(3):
        some = tuple(t.detach().clone().requires_grad_(i == wanted) for i, t in enumerate(whole))
        linear(*some).sum().backward()
        assert [t.grad is not None for t in some] == [i == wanted for i in range(3)]
        assert torch.equal(some[wanted].grad, whole[wanted].grad)
        assert some[wanted].grad.dtype == dtype
    with torch.no_grad():
        assert not linear(*whole).requires_grad


@needs_native
def test_gradients_add_up_in_main_grad():
    torch.manual_seed(3)
    x, weight, bias = parts(30, 64, dtype=torch.bfloat16)
    weight.main_grad, bias.main_grad = torch.ones(48, 64), torch.ones(48)
    for _ in range(2):
        linear(x, weight, bias).sum().backward()
    assert weight.grad is None and bias.grad is None and x.grad is not None
    rows = 2 * x.detach().double().sum(0) + 1
    torch.testing.assert_close(weight.main_grad.double(), rows.expand(48, 64), rtol=1e-5, atol=1e-5)
    assert (bias.main_grad == 61).all()


@needs_native
def test_recomputing_changes_no_bit():
    torch.manual_seed(4)
    actual = []
    x, *weights = parts(30, 64, dtype=torch.bfloat16, N=64)
    for again in (False, True):
        for t in (x, *weights):
            t.grad = None
        y = checkpoint(linear, x, *weights, use_reentrant=False) if again else linear(x, *weights)
        linear(y, *weights).square().sum().backward()
        actual.append([t.grad for t in (x, *weights)])
    assert all(torch.equal(a, b) for a, b in zip(*actual, strict=True))


@needs_native
def test_autocast_casts_as_in_torch():
    torch.manual_seed(5)
    ours, theirs = parts(30, 64, dtype=torch.float32), None
    theirs = tuple(t.detach().clone().requires_grad_() for t in ours)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = linear(*ours), torch.nn.functional.linear(*theirs)
    assert y.dtype == z.dtype == torch.bfloat16
    torch.testing.assert_close(y, z)
    y.float().sum().backward()
    z.float().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad.dtype == torch.float32
        torch.testing.assert_close(a.grad, b.grad, rtol=2**-6, atol=2**-6)


@needs_native
def test_several_threads_at_once():
    torch.manual_seed(6)
    whole = parts(60, 64, dtype=torch.bfloat16)
    expected, actual = linear(*whole), []
    threads = [threading.Thread(target=lambda: actual.extend(linear(*whole) for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(actual) == 80 and all(torch.equal(y, expected) for y in actual)


def test_mismatched_operands_are_rejected():
    with pytest.raises((ValueError, RuntimeError)):
        linear(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(RuntimeError, match="dtype"):
        linear(torch.ones(2, 3), torch.ones(4, 3, dtype=torch.bfloat16))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_weights_of_one_input(dtype):
    torch.manual_seed(7)
    x = torch.randn(2, 30, 64).to(dtype)
    weights = [(torch.randn(N, 64) / 8).to(dtype) for N in (48, 7, 16)]
    against_fp64(
        lambda x, *w: linears(x, w), lambda x, *w: tuple(linear_reference(x, each) for each in w), (x, *weights)
    )  # fmt: skip
    some = [x.clone().requires_grad_(), weights[0].clone(), weights[1].clone().requires_grad_()]
    some[2].main_grad = torch.ones(7, 64)
    sum(y.float().sum() for y in linears(some[0], some[1:])).backward()
    assert some[0].grad is not None and some[1].grad is None and some[2].grad is None and not torch.equal(
        some[2].main_grad, torch.ones(7, 64)
    )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(linears(x, weights)[1], linear(x, weights[1]))


def test_an_expanded_bias_is_left_to_torch():
    x, weight, bias = torch.randn(3, 64), torch.randn(40, 64), torch.arange(1.0, 101.0)[:1]
    assert torch.equal(linear(x, weight, bias), linear_reference(x, weight, bias))


def test_main_grad_of_another_shape_is_not_overrun():
    x, weight, bias = parts(30, 64, dtype=torch.bfloat16)
    weight.main_grad = torch.zeros(47, 64)
    with pytest.raises(ValueError, match=r"\[48, 64\].*main_grad.*\[47, 64\]"):
        linear(x, weight, bias).sum().backward()
    weight.main_grad, bias.main_grad = None, torch.zeros(47)
    with pytest.raises(ValueError, match=r"\[48\].*main_grad.*\[47\]"):
        linear(x, weight, bias).sum().backward()
