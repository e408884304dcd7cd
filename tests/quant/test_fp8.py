"""E4M3 in blocks of 128 x 128: codes, scales and positions, one weight at a time; taking over weights stored that way."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_optimizer.quant import fp8, get_format, reference_packer

FORMAT = get_format("fp8")


def value(code: int) -> float:
    """E4M3 by its definition."""
    exponent, mantissa = code >> 3 & 15, code & 7
    size = math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9)
    return -size if code >> 7 else size


def test_every_code_round_trips() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0
    packed = fp8.repack(codes.view(torch.float8_e4m3fn)[None], torch.ones(1, 2))
    assert FORMAT.unpack(packed, 1, 256)[0].tolist() == [value(code) for code in codes.tolist()]


@pytest.mark.parametrize("shape", [(17, 33), (130, 300)])
def test_codes_follow_the_definition(shape: tuple[int, int]) -> None:
    """The nearest code, ties to even; at the places given in dso.h, with the block's scale."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator) ** 10
    weight[3, 5] = 448.0  # the first block's scale is 1, so that ties occur
    weight[7, 3:30:3] = torch.tensor([17.0, 19.0, 2.125, 2.375, 0.0029296875, 0.0048828125, -17.0, -0.0009765625, 0.0])
    packed = FORMAT.pack(weight).numpy()
    positive = torch.tensor([value(code) for code in range(0x7F)], dtype=torch.float64)
    for row in range(0, shape[0], 7):
        for col in range(0, shape[1], 3):
            top, left = row // 128 * 128, col // 128 * 128
            scale = weight[top : top + 128, left : left + 128].abs().max() / 448
            tile = packed[row // 16, col // 32]
            assert tile[512:516].view("float32")[0] == scale and not tile[516:].any()
            code = int(tile[(col % 32 // 4 * 16 + row % 16) * 4 + (0, 2, 1, 3)[col % 4]])
            wanted = (weight[row, col].abs() / scale).double()
            distance = (positive - wanted).abs()
            nearest = [c for c in range(0x7F) if distance[c] == distance.min()]
            assert code & 0x7F in nearest and (len(nearest) == 1 or code % 2 == 0)
            assert code >> 7 == int(weight[row, col] < 0)
    assert not packed[-1, :, :512].reshape(-1, 8, 16, 4)[:, :, shape[0] % 16 :].any(), "padding is zeros"


def test_each_block_has_its_own_scale() -> None:
    weight = torch.ones(300, 400)
    weight[128:256, :128], weight[256:, 384:] = 1e-20, 1e20
    assert torch.equal(FORMAT.unpack(FORMAT.pack(weight), 300, 400), weight)


def test_non_finite_values_affect_only_their_block() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        weight = torch.ones(200, 200)
        weight[130, 3] = bad
        actual = FORMAT.unpack(FORMAT.pack(weight), 200, 200)
        assert actual[128:, :128].isnan().all() and actual[:128].isfinite().all() and actual[:, 128:].isfinite().all()


def test_zeros() -> None:
    assert not FORMAT.pack(-torch.zeros(20, 40)).any()
    assert not FORMAT.unpack(FORMAT.pack(torch.full((20, 40), 1e-44)), 20, 40).any(), "an invalid scale"


def test_taking_over_rounds_nothing() -> None:
    """Scales and codes that packing would not choose."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 256, (200, 300), dtype=torch.uint8, generator=generator)
    codes[codes & 0x7F == 0x7F] = 1
    codes, scale = codes.view(torch.float8_e4m3fn), torch.rand(2, 3, generator=generator)
    actual = FORMAT.unpack(reference_packer(codes, "fp8", scale=scale), 200, 300)
    for row, col in ((0, 0), (127, 127), (128, 256), (199, 299), (5, 200)):
        assert actual[row, col] == codes[row, col].float() * scale[row // 128, col // 128]
    assert torch.equal(actual, fp8.dequantize(codes, scale))
    assert torch.equal(actual[130:], fp8.dequantize(codes[130:], scale, 130))
    codes.view(torch.uint8)[130, 0] = 0xFF
    actual = FORMAT.unpack(fp8.repack(codes, scale), 200, 300)
    assert actual[128:, :128].isnan().all() and actual[:128].isfinite().all(), "a NaN is never lost"


def test_inputs_that_taking_over_rejects() -> None:
    codes = torch.zeros(200, 300).to(torch.float8_e4m3fn)
    for scale in (None, torch.ones(2, 2), torch.ones(2, 3).bfloat16(), torch.ones(6)):
        with pytest.raises(ValueError, match=r"scale must be float32 \[2, 3\]"):
            reference_packer(codes, "fp8", scale=scale)
    with pytest.raises(ValueError, match="codes must be"):
        fp8.repack(codes.float(), torch.ones(2, 3))
    with pytest.raises(ValueError, match="matrix"):
        FORMAT.pack(codes)
