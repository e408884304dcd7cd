"""Feed-forward blocks and norms in one call: bitwise the products and ops one after the other."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.backends.base import CompileOptions
from deepseek_optimizer.backends.cpu import CpuBackend, unavailable_reason
from deepseek_optimizer.backends.reference.ops import FUNCTIONS
from deepseek_optimizer.quant.packed import PackedMatrix

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(cpu, rows, cols, format, seed):
    return PackedMatrix(format, rows, cols, cpu.pack(random(rows, cols, seed=seed) / 8, format))


@pytest.mark.parametrize("activation", ["int8", "int16"])
@pytest.mark.parametrize("format", ["int8", "int4", "q4_1", "fp8", "bf16", "fp32"])
@pytest.mark.parametrize(
    ("op", "gated"), [("relu", False), ("gelu", False), ("gelu_erf", False), ("geglu", True), ("swiglu", True)]
)
@pytest.mark.parametrize("rows", [1, 7, 70, 300])
def test_equals_products_and_op(isa, op, gated, format, activation, rows):
    if activation == "int16" and format in ("fp8", "bf16", "fp32"):
        pytest.skip("not an integer format")
    cpu = CpuBackend(isa, 2)
    options = CompileOptions(activation)
    width, inner = 72, 210
    first = [(matrix(cpu, inner, width, format, seed), random(inner, seed=seed) if seed else None) for seed in range(1 + gated)]
    down = matrix(cpu, 40, inner, format, 5), random(40, seed=6)
    x = random(rows, width, seed=7)
    result = cpu.feed_forward(x, first, op, down, options)
    hidden = [cpu.linear(x, w, bias, options) for w, bias in first]
    error = (result - cpu.linear(FUNCTIONS[op](*hidden), *down, options)).abs().max()
    assert error <= (1e-5 if format in ("fp32",) else 0.02) * result.abs().max()  # the op differs in its last bits


@pytest.mark.parametrize("format", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_norm_and_addition_in_the_same_call(isa, rows, biased, format):
    cpu = CpuBackend(isa, 2)
    width, inner = 210, 72
    up, down = (matrix(cpu, inner, width, format, 1), None), (matrix(cpu, width, inner, format, 2), random(width, seed=3))
    x, norm = random(rows, width, seed=4), (random(width, seed=5), random(width, seed=6) if biased else None, 1e-6)
    block = cpu.feed_forward(cpu.norm(x, *norm), [up], "gelu", down)
    assert torch.equal(cpu.feed_forward(x, [up], "gelu", down, norm=norm), block)
    assert torch.equal(cpu.feed_forward(x, [up], "gelu", down, norm=norm, residual=True), x + block)
    plain = cpu.feed_forward(x, [up], "gelu", down)
    assert torch.equal(cpu.feed_forward(x, [up], "gelu", down, residual=True), x + plain)


@pytest.mark.parametrize("threads", [1, 3])
def test_shapes_and_threads(threads):
    cpu = CpuBackend(threads=threads)
    up, down = matrix(cpu, 64, 32, "int8", 1), matrix(cpu, 16, 64, "int8", 2)
    x = random(2, 3, 32)
    result = cpu.feed_forward(x, [(up, None)], "relu", (down, None))
    assert result.shape == (2, 3, 16)
    assert torch.equal(result, CpuBackend(threads=2).feed_forward(x, [(up, None)], "relu", (down, None)))
    assert cpu.feed_forward(x[:0], [(up, None)], "relu", (down, None)).shape == (0, 3, 16)


def test_refused():
    cpu = CpuBackend(threads=1)
    up, down, other = (matrix(cpu, *shape, "int8", 1) for shape in ((64, 32), (16, 64), (48, 32)))
    for first, op, second, message in (
        ([(up, None)], "relu", (other, None), "down has 32 columns, and up 64 rows"),
        ([(other, None), (up, None)], "geglu", (down, None), "gate is 48 x 32, and up 64 x 32"),
        ([(up, None)], "geglu", (down, None), "not an element-wise op with 1 inputs"),
        ([(up, None)], "linear", (down, None), "not an element-wise op"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.feed_forward(random(2, 32), first, op, second)
    with pytest.raises(ValueError, match="down has 16 rows, and up 32 columns"):
        cpu.feed_forward(random(2, 32), [(up, None)], "relu", (down, None), residual=True)
    with pytest.raises(ValueError, match="eps is -1"):
        cpu.feed_forward(random(2, 32), [(up, None)], "relu", (down, None), norm=(random(32), None, -1.0))
    with pytest.raises(ValueError, match="weight must be"):
        cpu.feed_forward(random(2, 32), [(up, None)], "relu", (down, None), norm=(random(31), None, 1e-6))


@pytest.mark.parametrize("shape", [(1, 16), (3, 5, 100), (700, 768)])
def test_norms(isa, shape):
    cpu = CpuBackend(isa, 2)
    x, weight, bias = random(*shape), random(shape[-1], seed=1), random(shape[-1], seed=2)
    expected = torch.nn.functional.layer_norm(x.double(), shape[-1:], weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(cpu.norm(x, weight, bias, 1e-5).double(), expected, rtol=1e-5, atol=1e-5)
    expected = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    torch.testing.assert_close(cpu.norm(x, weight, None, 1e-6).double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="eps is -1"):
        cpu.norm(x, weight, None, -1.0)
