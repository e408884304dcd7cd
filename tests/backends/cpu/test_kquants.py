"""Matrices in the formats of K-quants, IQ4 and 5-bit blocks: the reference's tiles and values, and products near float64."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer import quant
from deepseek_optimizer.backends import cpu
from deepseek_optimizer.backends.cpu import native
from deepseek_optimizer.quant import activations, ggml
from deepseek_optimizer.quant.kquants import BLOCK_FORMATS
from deepseek_optimizer.quant.packed import PackedMatrix

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))

NAMES = [f.name for f in BLOCK_FORMATS]
KINDS = {kind.name.lower(): kind for kind in ggml.GGML_TYPES.values()}


def random_bytes(name: str, rows: int, cols: int) -> torch.Tensor:
    """Rows of blocks of random bytes."""
    generator = torch.Generator().manual_seed(rows + cols)
    return torch.randint(0, 256, (rows, KINDS[name].row_bytes(cols)), dtype=torch.uint8, generator=generator)


def random_matrix(name: str, rows: int, cols: int) -> PackedMatrix:
    """Random codes and scales of every bit pattern; the fp16 numbers are finite."""
    matrix = quant.pack(torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)), name)
    fmt = quant.get_format(name)
    blocks, random = fmt.read(matrix.data), fmt.read(ggml.repack(random_bytes(name, rows, cols), name.upper(), cols))
    whole = quant.blocks.Blocks(
        random.codes,
        random.scale if fmt.superblock else blocks.scale,
        random.minimum if fmt.superblock else blocks.minimum,
        blocks.d,
        blocks.dmin,
    )
    fmt.write(matrix.data, whole)
    return matrix


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_repacked_as_the_reference_does(backend, name):
    for rows, cols in ((1, 256), (16, 512), (37, 768), (130, 256)):
        blocks = random_bytes(name, rows, cols)
        expected = quant.reference_packer(blocks, name)
        assert torch.equal(backend.pack(blocks, name), expected), (rows, cols)
        assert torch.equal(backend.pack(blocks.repeat(1, 2)[:, : blocks.shape[1]], name, torch.empty_like(expected)), expected)
    with pytest.raises(ValueError, match="bytes"):
        backend.pack(blocks[:, 1:], name)


@pytest.mark.parametrize("name", NAMES)
def test_floats_are_packed_by_the_reference(backend, name):
    weight = torch.randn(35, 512)
    assert torch.equal(backend.pack(weight, name), quant.get_format(name).pack(weight))


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_references(backend, name):
    for rows, cols in ((1, 256), (37, 768)):
        matrix = random_matrix(name, rows, cols)
        expected = quant.unpack(matrix)
        assert torch.equal(backend.unpack(matrix).view(torch.int32), expected.view(torch.int32))
        assert torch.equal(backend.unpack(matrix, rows // 2, rows), expected[rows // 2 :])


@pytest.mark.parametrize("activation", ["q8", "q16"])
@pytest.mark.parametrize("name", NAMES)
def test_products(backend, name, activation):
    """Kernel error alone, against the rounded rows and the dequantized weights in float64; equal bits on every ISA."""
    first = cpu.CpuBackend(isa=cpu.exact(next(n for n in native.isa_names() if native.isa_runs_here(n))), threads=1)
    generator = torch.Generator().manual_seed(1)
    for rows, cols in ((5, 256), (70, 768)):
        matrix = random_matrix(name, rows, cols)
        x, bias = torch.randn(21, cols, generator=generator), torch.randn(rows, generator=generator)
        y = backend.linear(x, matrix, bias, activation=activation)
        rounded, weights = activations.fake_quantize(x, activation).double(), quant.unpack(matrix).double()
        # Scales and minimums are summed apart, so that the bound counts both.
        fmt = quant.get_format(name)
        blocks = fmt.read(matrix.data)
        without = quant.blocks.Blocks(blocks.codes, blocks.scale, None, blocks.d)
        parts = fmt.dequantize(without)[:rows].double()
        size = rounded.abs() @ (parts.abs() + (weights - parts).abs()).T + bias.abs()
        groups = cols // fmt.group * (2 if fmt.has_min else 1)
        assert ((y - (rounded @ weights.T + bias)).abs() <= size * (groups + 5) * 2.0**-24).all()
        assert torch.equal(y, first.linear(x, matrix, bias, activation=activation, decode_rows=21))
        for count in (1, 2, 3, 4, 5, 6, 13):
            alone = backend.linear(x[21 - count :], matrix, bias, activation=activation, decode_rows=count // 2)
            assert torch.equal(alone, y[21 - count :]), count
