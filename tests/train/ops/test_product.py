"""Products in training: every layout, dtype and stride against fp64; groups; errors name the mismatch."""

import itertools
import random

import pytest
import torch

from deepseek_optimizer.train.ops import native
from deepseek_optimizer.train.ops import product as product_op
from deepseek_optimizer.train.ops.product import (
    column_sums,
    grouped_product,
    grouped_product_reference,
    product,
    product_reference,
)

needs_native = pytest.mark.skipif(not native.built(), reason="no native library on this machine")
DTYPES = (torch.float32, torch.bfloat16)
FORMS = ("nt", "nn", "tn")


def operands(form, M, N, K, dtypes=DTYPES[:1] * 2):
    a = torch.randn((K, M) if form == "tn" else (M, K)).to(dtypes[0])
    b = torch.randn((N, K) if form == "nt" else (K, N)).to(dtypes[1])
    return a, b


def within(result, form, a, b, extra=None):
    """Whether each element equals fp64's up to fp32 rounding of its K + 1 sums, and rounding to its dtype."""
    if torch.bfloat16 in (a.dtype, b.dtype):
        a, b = a.bfloat16(), b.bfloat16()
    right = product_reference(form, a.double(), b.double())
    size = product_reference(form, a.double().abs(), b.double().abs())
    if extra is not None:
        right, size = right + extra.double(), size + extra.double().abs()
    K = a.shape[0 if form == "tn" else 1]
    rounding = 2.0**-8 if result.dtype == torch.bfloat16 else 0
    return ((result.double() - right).abs() <= (K + 2) * 2.0**-24 * size + rounding * right.abs() + 1e-37).all()


@needs_native
@pytest.mark.parametrize("form", FORMS)
def test_every_layout_and_dtype_equals_fp64_up_to_rounding(form):
    random.seed(0)
    torch.manual_seed(0)
    sizes = [1, 2, 15, 16, 17, 33, 48, 49, 100]
    for dtypes in itertools.product(DTYPES, repeat=2):
        for _ in range(12):
            M, N, K = random.choice(sizes), random.choice(sizes), random.choice([*sizes, 0, 700])
            a, b = operands(form, M, N, K, dtypes)
            bias, out = torch.randn(N), torch.randn(M, N)
            assert within(product(form, a, b, bias=bias, dtype=torch.float32), form, a, b, bias)
            assert within(product(form, a, b, dtype=torch.bfloat16), form, a, b)
            old = out.clone()
            assert product(form, a, b, out=out, add=True) is out
            assert within(out, form, a, b, old)


@needs_native
@pytest.mark.parametrize("form", FORMS)
def test_views_are_bitwise_equal_to_contiguous_tensors(form):
    torch.manual_seed(1)
    for dtype in DTYPES:
        a, b = operands(form, 40, 50, 60, (dtype, dtype))
        expected = product(form, a, b)
        for make in (
            lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
            lambda t: t.t().contiguous().t(),
            lambda t: torch.cat([t, t], 1).reshape(-1, t.shape[1])[::2],
        ):
            assert torch.equal(product(form, make(a), make(b)), expected)
        row, weight = torch.randn(1, 60).to(dtype), torch.randn(50, 60).to(dtype)
        assert torch.equal(product("nt", row.expand(7, 60), weight), product("nt", row, weight).expand(7, 50))
        wide = torch.full((40, 60), 7.0, dtype=dtype)
        product(form, a, b, out=wide[:, 5:55])
        assert torch.equal(wide[:, 5:55], expected) and (wide[:, :5] == 7).all() and (wide[:, 55:] == 7).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_groups_equal_separate_products(form, dtype):
    torch.manual_seed(2)
    for ends in ([0, 0, 5, 5, 40], [0, 40], [0, 17, 33, 33], [0, 0]):
        offsets, T, E = torch.tensor(ends), ends[-1], len(ends) - 1
        a = torch.randn(T, 24).to(dtype)
        b = torch.randn({"nt": (E, 30, 24), "nn": (E, 24, 30), "tn": (T, 30)}[form]).to(dtype)
        actual = grouped_product(form, a, b, offsets)
        tolerance = {torch.bfloat16: 2**-7, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        right = grouped_product_reference(form, a.double(), b.double(), offsets)
        torch.testing.assert_close(actual.double(), right, rtol=tolerance, atol=tolerance)
        total = torch.ones_like(actual, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        grouped_product(form, a, b, offsets, out=total, add=True)
        torch.testing.assert_close(total.double(), right + 1, rtol=1e-5, atol=1e-5)


@needs_native
def test_sums_of_columns():
    torch.manual_seed(3)
    for dtype in DTYPES:
        x = torch.randn(90, 300).to(dtype)[:, 7:270]
        torch.testing.assert_close(column_sums(x, dtype=torch.float32).double(), x.double().sum(0), rtol=1e-5, atol=1e-5)
        total = torch.ones(263)
        column_sums(x, out=total, add=True)
        torch.testing.assert_close(total.double(), x.double().sum(0) + 1, rtol=1e-5, atol=1e-5)


def test_mismatched_depths_are_named():
    for form, a, b in (("nt", (3, 4), (5, 6)), ("nn", (3, 4), (5, 6)), ("tn", (3, 4), (5, 6))):
        with pytest.raises(ValueError, match=r"\[3, 4\] and \[5, 6\]"):
            product(form, torch.ones(a), torch.ones(b))


@pytest.mark.parametrize("form", FORMS)
def test_products_on_a_card_have_fp32_sums_of_bf16_operands(form, monkeypatch):
    """With torch's product of a card replaced by its definition."""
    asked = []

    def mm(left, right, *, out_dtype):
        asked.append((left.dtype, right.dtype, out_dtype))
        return left.float() @ right.float()

    monkeypatch.setattr(native, "usable", lambda *_: False)
    monkeypatch.setattr(product_op, "on_tensor_cores", lambda a, b: torch.bfloat16 in (a.dtype, b.dtype))
    monkeypatch.setattr(torch, "mm", mm)
    a, b = operands(form, 5, 7, 9, (torch.bfloat16, torch.float32))
    bias, start = torch.randn(7), torch.randn(5, 7)
    assert within(product(form, a, b, bias=bias, dtype=torch.float32), form, a, b, bias)
    assert within(product(form, a, b, out=start.clone(), add=True), form, a, b, start)
    assert asked == [(torch.bfloat16, torch.bfloat16, torch.float32)] * 2
