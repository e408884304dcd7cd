"""The chunked KL divergence against torch's in float64, its gradients, and its chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deepseek_optimizer.train.ops.divergence import linear_divergence


def _inputs(rows: int, dtype: torch.dtype = torch.float64, vocabulary: int = 37) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((rows, 8), (vocabulary, 8), (rows, 12), (vocabulary, 12))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(i < 2) for i, shape in enumerate(shapes)]


def _plain(hidden, weight, teacher_hidden, teacher_weight):
    """KL(teacher || student) per row, by torch."""
    ours, theirs = (hidden @ weight.t()).log_softmax(-1), (teacher_hidden @ teacher_weight.t()).log_softmax(-1)
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("chunk", [None, 1, 5, 64])
def test_chunks_equal_the_plain_divergence_in_float64(chunk):
    given = _inputs(23)
    expected, actual = _plain(*given), linear_divergence(*given, chunk=chunk)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12) and actual.item() > 0.1
    for ours, theirs in zip(
        torch.autograd.grad(3 * actual, given[:2]), torch.autograd.grad(3 * expected, given[:2]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    given = _inputs(4)
    for place, gradient in enumerate(torch.autograd.grad(linear_divergence(*given, chunk=3), given[:2])):
        direction = torch.randn_like(gradient)
        ends = [[*given[:place], (given[place] + step * direction).detach(), *given[place + 1 :]] for step in (1e-5, -1e-5)]
        slope = (linear_divergence(*ends[0]) - linear_divergence(*ends[1])) / 2e-5
        assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_native_types_follow_float64(dtype, tolerance):
    given = _inputs(40, dtype, vocabulary=96)
    exact = [t.detach().double().requires_grad_(i < 2) for i, t in enumerate(given)]
    expected, actual = _plain(*exact), linear_divergence(*given, chunk=16)
    assert actual.dtype == torch.float32 and actual.item() == pytest.approx(expected.item(), rel=tolerance)
    for ours, theirs in zip(torch.autograd.grad(actual, given[:2]), torch.autograd.grad(expected, exact[:2]), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() < tolerance * theirs.norm()


def test_a_gradient_is_added_to_main_grad():
    given = _inputs(9, torch.bfloat16)
    (plain,) = torch.autograd.grad(linear_divergence(*given), given[1])
    given[1].main_grad = torch.ones(given[1].shape, dtype=torch.float32)
    linear_divergence(*given).backward()
    assert given[1].grad is None
    torch.testing.assert_close(given[1].main_grad - 1, plain.float(), rtol=1e-2, atol=1e-4)


def test_equal_models_have_no_divergence_and_no_rows_none():
    hidden, weight, *_ = _inputs(6, torch.float32)
    assert linear_divergence(hidden, weight, hidden, weight).item() == pytest.approx(0, abs=1e-6)
    assert linear_divergence(hidden[:0], weight, hidden[:0], weight).item() == 0


def test_shapes_must_fit():
    hidden, weight, teacher_hidden, teacher_weight = _inputs(6)
    with pytest.raises(ValueError, match=r"they must be \[T, H\], \[V, H\], \[T, G\] and \[V, G\]"):
        linear_divergence(hidden[:5], weight, teacher_hidden, teacher_weight)
