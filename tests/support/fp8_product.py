"""The product of two matrices in FP8 as in section 3.3 of the DeepSeek-V3 report, step by step: the reference for the
others."""

from __future__ import annotations

import torch

from deepseek_optimizer.train.fp8.quantize import TILE


def block_product_reference(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, b_rows: int = 1
) -> torch.Tensor:
    """A B^T, promoted every 128 elements: sum over blocks k of (A_k B_k^T) * a_scale_k * b_scale_k, in fp32.

    Args:
        a: codes [M, K] with scales [M, ceil(K / 128)], in any FP8 type.
        b: codes [N, K] with scales [ceil(N / b_rows), ceil(K / 128)].
        b_rows: rows of B that share a scale: 1 or 128.
    """
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    rows = b_scale.repeat_interleave(b_rows, 0)[: b.shape[0]]
    for k, start in enumerate(range(0, a.shape[1], TILE)):
        part = a[:, start : start + TILE].float() @ b[:, start : start + TILE].float().t()
        total += part * a_scale[:, k, None] * rows[None, :, k]
    return total
