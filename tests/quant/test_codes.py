"""Integer codes as ggml blocks: packed without rounding, whatever the number of columns."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.quant import PackedMatrix, reference_packer, unpack
from deepseek_optimizer.quant.codes import int4_blocks, int8_blocks, q4_1_blocks


@pytest.mark.parametrize("shape", [(1, 32), (16, 64), (21, 45), (5, 1)])
@pytest.mark.parametrize("format", ["int4", "q4_1", "int8"])
def test_packed_without_rounding(shape, format):
    generator = torch.Generator().manual_seed(shape[0])
    low, high = {"int4": (-8, 8), "q4_1": (0, 16), "int8": (-128, 128)}[format]
    codes = torch.randint(low, high, shape, generator=generator, dtype=torch.int16)
    codes[0, 0], codes[-1, -1] = low, high - 1
    scale, minimum = (torch.randn(shape[0], -(-shape[1] // 32), generator=generator).half() for _ in range(2))
    if format == "q4_1":
        blocks = q4_1_blocks(codes, scale, minimum)
    else:
        blocks = (int4_blocks if format == "int4" else int8_blocks)(codes, scale)
    of_column = torch.arange(shape[1]) // 32
    wanted = codes.float() * scale.float()[:, of_column]
    if format == "q4_1":
        wanted = wanted + minimum.float()[:, of_column]
    assert torch.equal(unpack(PackedMatrix(format, *shape, reference_packer(blocks, format))), wanted)
