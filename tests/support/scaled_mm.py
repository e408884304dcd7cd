"""torch's `scaled_mm` with scales of blocks, for lack of a card that has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .fp8_product import block_product_reference


def scaled_mm_in_software(a, b, scale_a, kind_a, scale_b, kind_b, output_dtype):
    """Computes the same as cuBLASLt from its operand layout, which is checked like in torch's registration."""
    kinds = F.ScalingType
    assert kind_a == kinds.BlockWise1x128
    rows = 128 if kind_b == kinds.BlockWise128x128 else 1
    with torch.device("meta"):
        torch._scaled_mm_v2(
            *(t.to("meta") for t in (a, b)), [_meta(scale_a)], [kind_a.value], [], [_meta(scale_b)], [kind_b.value], [], None,
            output_dtype, (), False,
        )  # fmt: skip
    blocks = a.shape[1] // 128
    b_scale = scale_b.t()[:, :blocks] if rows == 128 else scale_b
    return block_product_reference(a, scale_a, b.t(), b_scale, rows).to(output_dtype)


def _meta(scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(scale.shape, scale.stride(), device="meta")
