"""Which kernels run: forcing a variant, errors for unsupported variants, and equality between variants."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.backends import cpu
from deepseek_optimizer.backends.cpu import native
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.quant import fp8, get_format, reference_packer
from deepseek_optimizer.quant.packed import PackedMatrix

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))


def test_a_forced_variant_is_the_one_that_runs(isa):
    assert cpu.CpuBackend(isa=cpu.exact(isa)).isa == isa


def test_a_family_name_means_its_best_variant():
    for family in ("avx2", "avx512", "neon"):
        members = [n for n in native.isa_names() if n.split("-")[0] == family and native.isa_runs_here(n)]
        if members:
            assert cpu.CpuBackend(isa=family).isa == members[-1]


def test_unsupported_variants_are_rejected_by_name():
    with pytest.raises(BackendError, match="avx1024"):
        cpu.CpuBackend(isa="avx1024")
    for name in native.isa_names():
        if not native.isa_runs_here(name):
            with pytest.raises(BackendError, match=name):
                cpu.CpuBackend(isa=cpu.exact(name))


def test_the_default_is_the_best_that_runs_and_never_an_emulation():
    best = [n for n in native.isa_names() if native.isa_runs_here(n) and "emulated" not in n][-1]
    assert cpu.CpuBackend().isa == best


@pytest.mark.parametrize("format_name", ["fp32", "bf16", "int8", "int8_nested", "int4_nested", "int4", "int3", "q4_1", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_native_packer_equals_the_reference_bit_for_bit(backend, format_name, dtype):
    generator = torch.Generator().manual_seed(3)
    for rows, cols in ((1, 1), (16, 32), (17, 33), (50, 130), (129, 64)):
        w = (torch.randn(rows, cols, generator=generator) * 0.1).to(dtype)
        w[0, 0] = 0
        w *= torch.tensor([[1.0, 1e-4, 1e-7]]).repeat(rows, 1).view(-1)[:rows, None]  # fp16 subnormals, and zero
        packed = backend.pack(w, format_name)
        assert torch.equal(packed, get_format(format_name).pack(w)), (rows, cols)
        importance = torch.rand(cols, generator=generator).square()
        weighted = backend.pack(w, format_name, importance=importance)
        assert torch.equal(weighted, get_format(format_name).pack(w, importance)), (rows, cols)
        matrix = PackedMatrix(format_name, rows, cols, packed)
        assert torch.equal(backend.unpack(matrix), get_format(format_name).unpack(packed, rows, cols))


@pytest.mark.parametrize("format_name", ["int3", "int4", "q4_1"])
def test_the_native_packer_searches_like_the_reference(backend, format_name):
    """Enough groups that each choice is the best of some, including non-finite groups and equal magnitudes."""
    generator = torch.Generator().manual_seed(6)
    w = torch.randn(320, 1000, generator=generator) * torch.logspace(-8, 5, 320)[:, None]
    w[::7, 40], w[3::7, 50] = torch.nan, -torch.inf
    w[1::7] = w[1::7].sign()
    importance = torch.randn(1000, generator=generator).exp() * (torch.rand(1000, generator=generator) > 0.2)
    for given in (None, importance, importance * 1e30, torch.zeros(1000)):
        assert torch.equal(backend.pack(w, format_name, importance=given), get_format(format_name).pack(w, given))
    for wrong in (importance[1:], importance.double()):
        with pytest.raises(ValueError, match=r"importance must be float32 \[1000\]"):
            backend.pack(w, format_name, importance=wrong)
    with pytest.raises(ValueError, match=r"importance\[0\] is -1"):
        backend.pack(w, format_name, importance=-torch.ones(1000))


@pytest.mark.parametrize("format_name, block_bytes", [("int8", 34), ("int4", 18), ("q4_1", 20)])
def test_the_native_packer_repacks_ggml_blocks_like_the_reference(backend, format_name, block_bytes):
    generator = torch.Generator().manual_seed(4)
    for rows, groups in ((1, 1), (16, 2), (17, 3), (50, 5), (129, 2)):
        blocks = torch.randint(0, 256, (rows, groups * block_bytes), dtype=torch.uint8, generator=generator)
        expected = reference_packer(blocks, format_name)
        assert torch.equal(backend.pack(blocks, format_name), expected), (rows, groups)
        assert torch.equal(backend.pack(blocks.repeat(1, 2)[:, : blocks.shape[1]], format_name), expected)
        out = torch.empty_like(expected)
        assert backend.pack(blocks, format_name, out) is out
        assert torch.equal(out, expected)
        with pytest.raises(ValueError, match="out must be contiguous"):
            backend.pack(blocks, format_name, out[..., 1:])
    with pytest.raises(ValueError, match="bytes"):
        backend.pack(blocks[:, 1:], format_name)


def test_the_native_packer_reads_e4m3_blocks_like_the_reference(backend):
    generator = torch.Generator().manual_seed(8)
    for rows, cols in ((1, 1), (128, 128), (17, 300), (300, 130)):
        codes, scale = fp8.quantize(torch.randn(rows, cols, generator=generator))
        expected = reference_packer(codes, "fp8", scale=scale)
        assert torch.equal(backend.pack(codes, "fp8", scale=scale), expected), (rows, cols)
        wide = torch.cat([codes.view(torch.uint8)] * 2, 1)[:, :cols].view(torch.float8_e4m3fn)
        assert torch.equal(backend.pack(wide, "fp8", torch.empty_like(expected), scale=scale), expected)
        assert torch.equal(backend.unpack(PackedMatrix("fp8", rows, cols, expected)), fp8.dequantize(codes, scale))
    codes.view(torch.uint8)[200, 5] = 0x7F
    assert torch.equal(backend.pack(codes, "fp8", scale=scale), reference_packer(codes, "fp8", scale=scale))
    for packer in (backend.pack, reference_packer):
        with pytest.raises(ValueError, match=r"scale must be float32 \[3, 2\].*not None"):
            packer(codes, "fp8")
        with pytest.raises(ValueError, match="packed as fp8, not int8"):
            packer(codes, "int8", scale=scale)


def test_fp8_products_are_close_and_independent_of_the_batch(backend):
    """Every path of the kernel: streamed, in panels, partial tiles and blocks; weights include E4M3's subnormals."""
    generator = torch.Generator().manual_seed(9)
    for rows, cols in ((5, 3), (70, 100), (200, 333)):
        w = torch.randn(rows, cols, generator=generator) * torch.rand(rows, cols, generator=generator) ** 12
        matrix = PackedMatrix("fp8", rows, cols, get_format("fp8").pack(w))
        x, bias = torch.randn(40, cols, generator=generator).bfloat16().float(), torch.randn(rows, generator=generator)
        real = backend.unpack(matrix).double()
        y = backend.linear(x, matrix, bias)
        size = x.double().abs() @ real.abs().T + bias.abs()
        assert ((y - (x.double() @ real.T + bias)).abs() <= size * (cols + 3) * 2.0**-24).all()
        for count in (1, 2, 3, 4, 5, 6, 7, 13):
            assert torch.equal(backend.linear(x[40 - count :], matrix, bias, decode_rows=count // 2), y[40 - count :]), count


@pytest.mark.parametrize("format_name", ["int8", "int8_nested", "int4_nested", "int4", "int3", "q4_1"])
@pytest.mark.parametrize("activation", ["q8", "q16"])
def test_integer_products_have_the_same_bits_on_every_isa(backend, format_name, activation):
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(70, 100, generator=generator)
    matrix = PackedMatrix(format_name, 70, 100, get_format(format_name).pack(w))
    x = torch.randn(37, 100, generator=generator)
    first = cpu.CpuBackend(isa=cpu.exact(next(n for n in native.isa_names() if native.isa_runs_here(n))), threads=1)
    assert torch.equal(
        backend.linear(x, matrix, activation=activation), first.linear(x, matrix, activation=activation, decode_rows=37)
    )
