"""Cross entropy through a head in chunks: the reference's gradients, the native form against fp64, memory, labels of all
kinds."""

import pytest
import torch
import torch.nn.functional as F

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.train.ops import cross_entropy, native
from deepseek_optimizer.train.ops.cross_entropy import cross_entropy_, linear_cross_entropy
from support.op_checks import BOUNDS

needs_native = pytest.mark.skipif(not native.built(), reason="no native library on this machine")


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    num_items: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear_cross_entropy` in plain torch, with whole logits."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden.to(wide), weight.to(wide)).reshape(-1, weight.shape[0])
    total = F.cross_entropy(logits, labels.reshape(-1), ignore_index=ignore_index, reduction="sum")
    items = float(num_items) if num_items is not None else float((labels != ignore_index).sum())
    return total / items if items else total * 0


def operands(tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    hidden, weight = torch.randn(tokens, width).to(dtype), (0.3 * torch.randn(vocabulary, width)).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[::5] = -100
    return hidden, weight, labels


def gradients(loss_of, hidden, weight, labels, upstream: float = 1.0, **options) -> tuple[torch.Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
    loss = loss_of(*leaves, labels, **options)
    (upstream * loss).backward()
    return loss.detach(), *(t.grad for t in leaves)


@pytest.mark.parametrize("options", [{}, {"num_items": 3}])
def test_gradients_of_the_reference_and_by_chunks_in_fp64(options):
    torch.manual_seed(0)
    hidden, weight, labels = operands(11, 5, 7)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy_reference(h, w, labels, **options), leaves)
    expected = gradients(linear_cross_entropy_reference, hidden, weight, labels, **options)
    for chunk in (None, 4):
        torch.testing.assert_close(gradients(linear_cross_entropy, hidden, weight, labels, chunk=chunk, **options), expected)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"num_items": 17}, {"num_items": torch.tensor(40)}])
def test_native_equals_fp64_up_to_rounding(dtype, options):
    torch.manual_seed(1)
    for (tokens, width, vocabulary), chunk in (
        ((37, 24, 101), None),
        ((37, 24, 101), 8),
        ((300, 64, 4099), 50),
        ((1, 8, 1), None),
    ):
        hidden, weight, labels = operands(tokens, width, vocabulary, dtype)
        actual = gradients(linear_cross_entropy, hidden, weight, labels, 3.0, chunk=chunk, **options)
        expected = gradients(linear_cross_entropy_reference, hidden.double(), weight.double(), labels, 3.0, **options)
        assert actual[0].dtype == torch.float32 and actual[0].item() == pytest.approx(expected[0].item(), rel=1e-6, abs=1e-7)
        for a, b in zip(actual[1:], expected[1:], strict=True):
            assert a.dtype == dtype and (a.double() - b).abs().max() <= BOUNDS[dtype] * b.abs().max() + 1e-7
        assert not actual[1][labels == -100].any()


@pytest.mark.parametrize("chunk", [None, 5])
def test_frozen_parts_have_no_gradient_and_no_grad_none_at_all(chunk):
    hidden, weight, labels = operands(20, 8, 30, torch.float32)
    whole = gradients(linear_cross_entropy, hidden, weight, labels, chunk=chunk)
    loose = hidden.clone().requires_grad_()
    linear_cross_entropy(loose, weight, labels, chunk=chunk).backward()
    torch.testing.assert_close(loose.grad, whole[1])
    with torch.no_grad():
        loss = linear_cross_entropy(loose, weight.clone().requires_grad_(), labels, chunk=chunk)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, whole[0])


def test_accumulated_fp32_gradients_are_added_to():
    hidden, weight, labels = operands(20, 8, 30, torch.bfloat16)
    expected = gradients(linear_cross_entropy, hidden, weight, labels, 0.5)[2]
    parameter = torch.nn.Parameter(weight.clone())
    parameter.main_grad = torch.ones(30, 8)
    (0.5 * linear_cross_entropy(hidden, parameter, labels, chunk=7)).backward()
    assert parameter.grad is None
    torch.testing.assert_close(parameter.main_grad - 1, expected.float(), rtol=0.01, atol=1e-4)


def test_rows_without_labels_need_no_products(monkeypatch):
    hidden, weight, labels = operands(40, 8, 30, torch.float32)
    labels[:36], labels[36:] = -100, 3
    rows = []
    real = cross_entropy.product
    monkeypatch.setattr(
        cross_entropy, "product", lambda form, a, *rest, **options: rows.append(len(a)) or real(form, a, *rest, **options)
    )
    gradients(linear_cross_entropy, hidden, weight, labels)
    assert set(rows) == {4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 6])
def test_without_a_single_label_the_loss_is_zero_and_so_are_gradients(dtype, tokens):
    hidden, weight, labels = operands(tokens, 8, 30, dtype)
    loss, dhidden, dweight = gradients(linear_cross_entropy, hidden, weight, torch.full_like(labels, -100))
    assert loss == 0 and not dhidden.any() and not dweight.any() and dweight.shape == weight.shape


def test_leading_dimensions_and_another_ignored_label():
    hidden, weight, labels = operands(24, 8, 30, torch.float32)
    flat = gradients(linear_cross_entropy, hidden, weight, labels)
    labels[labels == -100] = 7777
    wide = gradients(linear_cross_entropy, hidden.view(2, 12, 8), weight, labels.view(2, 12), ignore_index=7777)
    assert wide[1].shape == (2, 12, 8) and all(torch.equal(a, b.view_as(a)) for a, b in zip(flat, wide, strict=True))


def test_a_label_outside_the_head_is_an_error():
    hidden, weight, labels = operands(6, 8, 30, torch.float32)
    for wrong in (30, -1):
        labels[3] = wrong
        with pytest.raises(ConfigError, match=f"labels contain {wrong}, .* 0 to 29"):
            linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(ValueError, match="hidden is"):
        linear_cross_entropy(hidden, weight, labels[:5])


def test_non_finite_values_propagate():
    hidden, weight, labels = operands(6, 8, 30, torch.float32)
    for value in (float("nan"), float("inf")):
        damaged = hidden.clone()
        damaged[2] = value
        labels[2] = 1
        loss, dhidden, _ = gradients(linear_cross_entropy, damaged, weight, labels, chunk=4)
        assert not loss.isfinite() and not dhidden[2].isfinite().all() and dhidden[4].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_very_large_very_small_and_forbidden_logits(dtype):
    logits = torch.randn(5, 100)
    logits[0] *= 1e4
    logits[1] = -3e38
    logits[2, 10:] = float("-inf")
    logits[3, 4] = 3e38
    labels = torch.tensor([1, 2, 3, 4, 5])
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels, reduction="sum")
    expected.backward()
    loss, gradient = cross_entropy_(logits.clone(), labels, 2.0, dtype)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), 2 * exact.grad, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
    forbidden = torch.full((1, 40), float("-inf"))
    assert torch.tensor(cross_entropy_(forbidden, torch.tensor([3]), None, dtype)[0]).isnan()  # as in torch


def test_a_second_backward_is_an_error():
    hidden, weight, labels = operands(6, 8, 30, torch.float32)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward"):
        loss.backward()


def test_the_logits_never_exist_as_a_whole():
    pieces = cross_entropy.chunks_of(2048, 49152, None)
    assert max(p.stop - p.start for p in pieces) * 49152 * 4 <= 64 << 20
    assert [p.start for p in pieces] == [0, *(p.stop for p in pieces[:-1])] and pieces[-1].stop == 2048
    assert all((p.stop - p.start) % 16 == 0 for p in pieces[:-1])
    assert cross_entropy.chunks_of(5, 10**9, None) == [slice(0, 5)] and cross_entropy.chunks_of(0, 10, None) == []


def test_many_chunks_are_summed_in_fp32():
    torch.manual_seed(2)
    hidden, weight, labels = operands(400, 16, 50, torch.bfloat16)
    exact = gradients(linear_cross_entropy_reference, hidden.double(), weight.double(), labels)[2]

    def off(chunk: int) -> float:
        actual = gradients(linear_cross_entropy, hidden, weight, labels, chunk=chunk)[2]
        return float((actual.double() - exact).norm() / exact.norm())

    assert off(chunk=8) < 0.004 > off(chunk=400)  # 40 chunks and one: the rounding of logits' gradients, and of the result
    assert off(chunk=48) < 0.006  # in bf16
