"""Ops that are on their way, by their contract; this file goes when they are there."""

from __future__ import annotations

import torch
import torch.nn.functional as F

try:
    from ..ops.grouped import grouped_linear
except ImportError:

    def grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ends = offsets.tolist()
        return torch.cat([F.linear(x[a:b], w) for a, b, w in zip(ends, ends[1:], weight, strict=False)])


try:
    from ..ops.swiglu import swiglu
except ImportError:

    def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * up


try:
    from ..ops.rope import rope
except ImportError:

    def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
        half = x.shape[-1] // 2
        c, s = cos[:, None, :, :half], sin[:, None, :, :half]
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
        return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)


try:
    from ..ops.cross_entropy import linear_cross_entropy
except ImportError:

    def linear_cross_entropy(hidden, weight, labels, *, ignore_index=-100, num_items=None, chunk=None):  # type: ignore
        how = "mean" if num_items is None else "sum"
        loss = F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=ignore_index, reduction=how)
        return loss if num_items is None else loss / num_items


try:
    from ..ops.linear import linear
except ImportError:

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, weight, bias)


try:
    from ..ops.mlp import mlp
except ImportError:

    def mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return linear(swiglu(linear(x, gate), linear(x, up)), down)


try:
    from ..ops.rms_norm import rms_norm
except ImportError:

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype) * weight
