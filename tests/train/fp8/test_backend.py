"""Which implementation is chosen, and that both do FP8 arithmetic: the emulation against the report's definition, the operands
for the hardware against torch's checks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.train.fp8 import backend, choose, hardware
from deepseek_optimizer.train.fp8.backend import Fp8Products
from deepseek_optimizer.train.fp8.quantize import BLOCK, E4M3, E5M2, ROW, quantize
from support.fp8_product import block_product_reference
from support.scaled_mm import scaled_mm_in_software

SHAPES = ((1, 1, 1), (5, 130, 64), (128, 128, 128), (33, 200, 513), (300, 64, 129))  # T, N, K
CPU = torch.device("cpu")


def operands(T: int, N: int, K: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(T + N + K)
    made = [torch.randn(*shape, generator=generator) for shape in ((T, K), (N, K), (T, N))]
    made[0] *= torch.exp2(torch.randint(-4, 9, (T, 1), generator=generator).float())  # rows with outliers
    return [t.to(dtype) for t in made]


def close(result: torch.Tensor, expected: torch.Tensor, terms: torch.Tensor, depth: int) -> None:
    """Within the difference that another order of fp32 sums may cause: depth * eps * sum |a||b|."""
    assert ((result.double() - expected.double()).abs() <= 2 * depth * 2.0**-24 * terms.double() + 1e-30).all()


def definition(a: torch.Tensor, b: torch.Tensor, a_dtype=E4M3, b_dtype=E4M3, b_tile=ROW):
    """A B^T as in the report, and the sum of the terms' magnitudes."""
    (ca, sa), (cb, sb) = quantize(a, ROW, a_dtype), quantize(b, b_tile, b_dtype)
    rows = b_tile[0]
    absolute = [c.float().abs().to(c.dtype) for c in (ca, cb)]
    return block_product_reference(ca, sa, cb, sb, rows), block_product_reference(absolute[0], sa, absolute[1], sb, rows)


@pytest.mark.parametrize("gradients", [E4M3, E5M2])
@pytest.mark.parametrize("shape", SHAPES)
def test_emulation_follows_the_report(shape, gradients) -> None:
    x, w, dy = operands(*shape)
    T, N, K = shape
    how = Fp8Products(gradients)
    close(how.forward(x, w, None), *definition(x, w, b_tile=BLOCK), depth=K)
    close(how.input_gradient(dy, w), *definition(dy, w.t(), gradients, b_tile=BLOCK), depth=N)
    close(how.weight_gradient(dy, x), *definition(dy.t(), x.t(), gradients), depth=T)


def test_reference_equals_float64_for_any_scales() -> None:
    """The definition against float64, with scales that are not powers of two."""
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randn(n, 300, generator=generator).to(E4M3) for n in (7, 130)]
    scales = [torch.rand(7, 3, generator=generator), torch.rand(2, 3, generator=generator)]
    a = codes[0].double() * scales[0].double().repeat_interleave(128, 1)[:, :300]
    b = codes[1].double() * scales[1].double().repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :300]
    actual = block_product_reference(codes[0], scales[0], codes[1], scales[1], 128)
    close(actual, a @ b.t(), a.abs() @ b.abs().t(), 300)


@pytest.mark.parametrize("gradients", [E4M3, E5M2])
def test_error_against_exact_products(gradients) -> None:
    """Each operand's error is at most half a unit, relative 2^-4 (E4M3) or 2^-3 (E5M2); a sum's is less than both together."""
    x, w, dy = operands(64, 96, 300, torch.bfloat16)
    how = Fp8Products(gradients)
    small, grad = 2.0**-4, 2.0**-4 if gradients == E4M3 else 2.0**-3
    for actual, a, b, first in (
        (how.forward(x, w, None), x, w.t(), small),
        (how.input_gradient(dy, w), dy, w, grad),
        (how.weight_gradient(dy, x), dy.t(), x, grad),
    ):
        exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        floor = 2.0**-9 * a.abs().max().double() * b.abs().max().double() * a.shape[1]  # values that round to zero in a tile
        error = (actual.double() - exact).abs()
        assert (error <= ((1 + first) * (1 + small) - 1 + 2.0**-8) * terms + floor).all()
        assert error.max() > 2.0**-8 * terms.max(), "FP8 was used: bf16 would be far closer"
        assert error.pow(2).mean().sqrt() < 0.05 * exact.pow(2).mean().sqrt() * (1 if gradients == E4M3 else 2)


def test_every_operand_is_on_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def product(form, a, b, **options):
        seen.extend((a, b))
        return real(form, a, b, **options)

    real = backend.product
    monkeypatch.setattr(backend, "product", product)
    x, w, dy = operands(40, 50, 60, torch.bfloat16)
    how = Fp8Products()
    how.forward(x, w, None), how.input_gradient(dy, w), how.weight_gradient(dy, x)
    assert len(seen) == 6
    for operand in seen:  # four of bf16's seven explicit significand bits are zero
        assert operand.dtype == torch.bfloat16 and not operand.view(torch.int16).bitwise_and(0b1111).any()


def test_choice_without_fp8_hardware() -> None:
    assert choose("emulate", CPU).on_hardware is False
    auto = choose("auto", CPU, e4m3=False)
    assert not auto.on_hardware and auto.gradients == E5M2
    assert "emulated" in auto.note and "slower" in auto.note and "the device is cpu" in auto.note
    with pytest.raises(BackendError, match="Hopper.*compute capability 9.0.*the device is cpu.*emulate"):
        choose("hardware", CPU)


@pytest.mark.parametrize(
    ("capability", "cuda", "reason"),
    [((8, 9), "12.9", "compute capability 8.9"), ((10, 0), "13.0", "compute capability 10.0"),
     ((9, 0), "12.8", "CUDA 12.9 or later"), ((9, 0), "12.9", None), ((9, 0), "13.0", None)],
)  # fmt: skip
def test_choice_by_device_and_build(monkeypatch: pytest.MonkeyPatch, capability, cuda, reason) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    device = torch.device("cuda", 0)
    if reason is None:
        assert choose("hardware", device).on_hardware and choose("auto", device).on_hardware
        assert not choose("emulate", device).on_hardware
        monkeypatch.delattr(F, "scaled_mm")
        assert "install torch 2.10" in str(hardware.why_not(device))
    else:
        with pytest.raises(BackendError, match=reason):
            choose("hardware", device)
        assert not choose("auto", device).on_hardware


@pytest.mark.parametrize("gradients", [E4M3, E5M2])
@pytest.mark.parametrize("shape", SHAPES)
def test_hardware_operands_have_the_layout_that_torch_requires(monkeypatch: pytest.MonkeyPatch, shape, gradients) -> None:
    """On a device that reports FP8 support: `scaled_mm` is called once per product, and its operands give the same result."""
    calls = []

    def scaled_mm(*args, **kwargs):
        calls.append(args)
        return scaled_mm_in_software(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    x, w, dy = operands(*shape, torch.bfloat16)
    emulated, on_hardware = Fp8Products(gradients), Fp8Products(gradients, on_hardware=True)
    for product in ("forward", "input_gradient", "weight_gradient"):
        arguments = {"forward": (x, w, None), "input_gradient": (dy, w), "weight_gradient": (dy, x)}[product]
        expected, actual = (getattr(how, product)(*arguments) for how in (emulated, on_hardware))
        assert actual.shape == expected.shape and actual.dtype == torch.bfloat16
        assert (actual.double() - expected.double()).abs().max() <= 2.0**-7 * expected.double().abs().max()
    assert len(calls) == 3
    assert [args[0].dtype for args in calls] == [E4M3, gradients, gradients] and {args[1].dtype for args in calls} == {E4M3}
