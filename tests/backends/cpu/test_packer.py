"""Packing and single products outside plans: any tensor works, or raises an error that names it."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.backends.cpu import CpuBackend, unavailable_reason
from deepseek_optimizer.quant import get_format
from deepseek_optimizer.quant.packed import PackedMatrix

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")


@pytest.fixture(scope="module")
def cpu():
    return CpuBackend(threads=1)


VIEWS = {
    "transposed": lambda w: w.T,
    "columns": lambda w: w[:, 3:40],
    "every other row": lambda w: w[::2],
    "one row many times": lambda w: w[:1].expand(5, -1),
    "one column many times": lambda w: w[:, :1].expand(-1, 33),
    "one row, whose stride says nothing": lambda w: w[:, :1].contiguous().T,
    "one column": lambda w: w[:, :1],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packs_views(cpu, view, dtype):
    weight = view(torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).to(dtype))
    assert torch.equal(cpu.pack(weight, "int8"), get_format("int8").pack(weight.contiguous().float()))


@pytest.mark.parametrize("shape", [(0, 64), (5, 0)])
def test_empty_matrices_are_rejected(cpu, shape):
    with pytest.raises(ValueError, match="a matrix of"):
        cpu.pack(torch.empty(shape), "int8")


@pytest.mark.parametrize("length", [19, 21, 1])
def test_a_bias_of_another_length_is_rejected(cpu, length):
    matrix = PackedMatrix("fp32", 20, 32, cpu.pack(torch.ones(20, 32), "fp32"))
    assert torch.equal(cpu.linear(torch.ones(1, 32), matrix, torch.ones(20)), torch.full((1, 20), 33.0))
    with pytest.raises(ValueError, match="bias must be contiguous"):
        cpu.linear(torch.ones(1, 32), matrix, torch.ones(length))


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize(("rows", "cols"), [(3, 5), (211, 72), (2049, 300)])
def test_gradient_of_a_packed_product(cpu, format, rows, cols):
    torch.manual_seed(0)
    matrix = PackedMatrix(format, rows, cols, cpu.pack(torch.randn(rows, cols), format))
    weight = cpu.unpack(matrix).double()
    for dtype, unit in ((torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8)):  # bf16: the weight is rounded too
        grad = torch.randn(2, 9, rows).to(dtype)
        actual = cpu.linear_gradient(grad, matrix)
        assert actual.shape == (2, 9, cols) and actual.dtype == torch.float32
        bound = (unit + rows * 2.0**-23) * (grad.double().abs() @ weight.abs())
        assert ((actual.double() - grad.double() @ weight).abs() <= bound).all()
    assert cpu.linear_gradient(torch.randn(0, rows), matrix).shape == (0, cols)
