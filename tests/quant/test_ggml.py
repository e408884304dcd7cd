"""Repacked ggml blocks have exactly the values of ggml's own decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from gguf.constants import GGML_QUANT_SIZES

from deepseek_optimizer import quant
from deepseek_optimizer.quant import ggml

GROUPS = ["Q4_0", "Q4_1", "Q8_0"]
BLOCKS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q5_0", "Q5_1", "MXFP4"]
LOSSLESS = GROUPS + BLOCKS
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)} | dict.fromkeys(("Q4_1", "Q4_K", "Q5_K", "Q5_1"), (0, 2))


def random_bytes(rows: int, cols: int, name: str) -> torch.Tensor:
    """Blocks of random bytes: codes and scales of every bit pattern, fp16 numbers that are denormal, infinite or NaN."""
    kind = ggml.GGML_TYPES[GGMLQuantizationType[name]]
    generator = torch.Generator().manual_seed(rows + cols)
    return torch.randint(0, 256, (rows, kind.row_bytes(cols)), dtype=torch.uint8, generator=generator)


def random_blocks(rows: int, cols: int, name: str) -> torch.Tensor:
    """Blocks with every code (including Q8_0's -128), with moderate scales of both signs; some are zero or denormal."""
    kind = ggml.GGML_TYPES[GGMLQuantizationType[name]]
    blocks = random_bytes(rows, cols, name).view(rows, cols // kind.block, -1)
    generator = torch.Generator().manual_seed(rows)
    if name == "MXFP4":
        blocks[..., 0] = blocks[..., 0] // 8 + 112
        return blocks.view(rows, -1)
    for at in HALVES.get(name, (0,)):
        scales = torch.randn(*blocks.shape[:2], 1, generator=generator)
        scales *= torch.tensor([1.0, 1.0, 1e-6, 0.0])[torch.randint(0, 4, scales.shape, generator=generator)]
        blocks[..., at : at + 2] = scales.half().view(torch.uint8)
    return blocks.view(rows, -1)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns, with one NaN."""
    return x.nan_to_num(nan=1e30, posinf=2e30, neginf=-2e30).view(torch.int32)


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("shape", [(1, 256), (37, 512), (130, 4096)])
def test_any_bytes_have_ggmls_values(name: str, shape: tuple[int, int]) -> None:
    blocks = random_bytes(*shape, name)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType[name]))
    assert torch.equal(bits(ggml.to_float(blocks, name, shape[1])), bits(expected))


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("shape", [(1, 32), (16, 64), (17, 96), (211, 576), (2100, 288)])
def test_values_equal_ggml(name: str, shape: tuple[int, int]) -> None:
    shape = shape[0], shape[1] if name in GROUPS else 256 * -(-shape[1] // 256)
    blocks = random_blocks(*shape, name)
    fmt = quant.get_format(ggml.lossless_format(name))
    tiles = ggml.repack(blocks, name, shape[1])
    expected = torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType[name]))
    assert torch.equal(fmt.unpack(tiles, *shape), expected)
    assert torch.equal(ggml.to_float(blocks, name, shape[1]), expected)
    if shape[0] % 16:  # rows past the end equal packed zeros
        below = fmt.unpack(tiles, tiles.shape[0] * 16, shape[1])[shape[0] :]
        assert torch.equal(below, torch.zeros_like(below))
        rest = torch.cat([fmt.unpack(tiles, *shape), torch.zeros_like(below)])
        assert torch.equal(fmt.unpack(ggml.repack(blocks, name, shape[1]), len(rest), shape[1]), rest)


@pytest.mark.parametrize("name", GROUPS)
def test_padding_has_codes_of_zero(name: str) -> None:
    fmt = quant.get_format(ggml.lossless_format(name))
    tiles = ggml.repack(random_blocks(1, 32, name), name, 32)[0, 0]
    empty = fmt.pack(torch.zeros(16, 32))[0, 0]
    codes = fmt.tile_bytes - 32 * (2 if name == "Q4_1" else 1)
    assert torch.equal(tiles[:codes].view(-1, 16, 4)[:, 1:], empty[:codes].view(-1, 16, 4)[:, 1:])
    assert not tiles[codes:].view(torch.int16).view(-1, 16)[:, 1:].any()


def test_q8_0_keeps_minus_128() -> None:
    blocks = torch.zeros(1, 34, dtype=torch.uint8)
    blocks[0, :2] = torch.tensor([1.0]).half().view(torch.uint8)
    blocks[0, 5] = 0x80
    assert quant.get_format("int8").unpack(ggml.repack(blocks, "Q8_0", 32), 1, 32)[0, 3] == -128


@pytest.mark.parametrize("name", LOSSLESS)
def test_the_reference_packer_repacks_blocks(name: str) -> None:
    blocks = random_blocks(48, 512, name)
    out = torch.empty_like(ggml.repack(blocks, name, 512))
    assert quant.reference_packer(blocks, ggml.lossless_format(name), out) is out
    assert torch.equal(out, ggml.repack(blocks, name, 512))
    with pytest.raises(ValueError, match="41 bytes"):
        quant.reference_packer(torch.zeros(3, 41, dtype=torch.uint8), ggml.lossless_format(name))
    with pytest.raises(ValueError, match="bf16"):
        quant.reference_packer(blocks, "bf16")


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "F64", "NVFP4", "TQ2_0", "IQ1_M", "IQ2_XS", "IQ3_S"])
def test_other_types_become_floats(name: str) -> None:
    kind = ggml.GGML_TYPES[GGMLQuantizationType[name]]
    if name == "F64":
        blocks, expected = torch.randn(3, 256, dtype=torch.float64), None
        got = ggml.to_float(blocks.view(torch.uint8), name, 256)
        assert torch.equal(got, blocks.float())
        return
    blocks = torch.randint(0, 120, (3, kind.row_bytes(256)), dtype=torch.uint8)
    expected = torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType[name]).copy())
    assert torch.equal(ggml.to_float(blocks, name, 256).float().nan_to_num(), expected.nan_to_num())


def test_unsupported_types() -> None:
    with pytest.raises(NotImplementedError):
        ggml.to_float(torch.zeros(1, 292, dtype=torch.uint8), "Q8_K", 256)


def test_the_table_equals_ggml() -> None:
    for code, kind in ggml.GGML_TYPES.items():
        if kind.name in GGMLQuantizationType.__members__:  # an older gguf package has fewer types
            assert GGML_QUANT_SIZES[GGMLQuantizationType[kind.name]] == (kind.block, kind.block_bytes)
            assert GGMLQuantizationType[kind.name] == code
    assert {k.name for k in GGMLQuantizationType} <= {k.name for k in ggml.GGML_TYPES.values()} | {"Q8_K"}
