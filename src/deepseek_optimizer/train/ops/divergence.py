"""The KL divergence of a student's next-token distributions from a teacher's, computed in chunks of rows.

KL(p || q) = sum p (log p - log q) with p = softmax(teacher_hidden teacher_weight^T) and q = softmax(hidden weight^T), as in
knowledge distillation at temperature 1 (Hinton et al., arXiv 1503.02531). The gradient of the student's logits is q - p. As in
`cross_entropy.py`, the forward pass also computes the gradients, and no more than a chunk of the logits is in memory.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.autograd.function import once_differentiable

from . import early_gradients, native
from .cross_entropy import chunks_of
from .product import product

_BLOCK_BYTES: Final = 2 << 20  # logits that are processed at once, so that they stay in the cache


def linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    chunk: int | None = None,
) -> torch.Tensor:
    """The mean over rows of KL(teacher || student), in nats.

    Args:
        hidden: [T, H], the student's.
        weight: [V, H], the student's head. If it has a `main_grad`, its gradient is added to that instead of being returned to
            torch.
        teacher_hidden, teacher_weight: [T, G] and [V, G]; they get no gradient.
        chunk: rows per chunk; None: as many as have 64 MB of logits.

    Returns: fp32 scalar (fp64 for fp64 inputs); 0 if there are no rows.

    Raises:
        ValueError: shapes do not match.
    """
    one_width = hidden.shape[1:] == weight.shape[1:] and teacher_hidden.shape[1:] == teacher_weight.shape[1:]
    if not one_width or len(hidden) != len(teacher_hidden) or len(weight) != len(teacher_weight):
        shapes = [list(t.shape) for t in (hidden, weight, teacher_hidden, teacher_weight)]
        raise ValueError(f"linear_divergence: got {shapes}; they must be [T, H], [V, H], [T, G] and [V, G]")
    needed = torch.is_grad_enabled() and hidden.requires_grad, torch.is_grad_enabled() and weight.requires_grad
    teacher = teacher_hidden.detach(), teacher_weight.detach()
    result: torch.Tensor = _LinearDivergence.apply(hidden, weight, *teacher, chunk, needed)
    return result


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, teacher_hidden: torch.Tensor, teacher_weight: torch.Tensor,
        chunk: int | None, needed: tuple[bool, bool],
    ) -> torch.Tensor:  # fmt: skip
        dhidden = native.new(hidden.shape, hidden) if needed[0] else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        dweight = native.new(weight.shape, weight, wide).zero_() if needed[1] else None
        total, factor = 0.0, 1 / max(1, len(hidden))
        chunks = chunks_of(len(hidden), weight.shape[0], chunk)
        height = chunks[0].stop if chunks else 0
        ours, theirs = (native.new((height, weight.shape[0]), hidden, wide) for _ in range(2))
        for part in chunks:
            x, y = hidden[part], teacher_hidden[part]
            logits = product("nt", x, weight, out=ours[: len(x)])
            wanted = product("nt", y, teacher_weight, out=theirs[: len(y)])
            total += divergence_(logits, wanted, factor)
            gradient = logits.to(x.dtype)
            if dhidden is not None:
                product("nn", gradient, weight, out=dhidden[part])
            if dweight is not None:
                product("tn", gradient, x, out=dweight, add=True)
        early_gradients.keep(ctx, weight, dhidden, dweight)
        return torch.tensor(total * factor, dtype=wide, device=hidden.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        return *early_gradients.scaled(ctx, upstream, "linear_divergence"), None, None, None, None


def divergence_(logits: torch.Tensor, teacher: torch.Tensor, factor: float) -> float:
    """The sum over rows of KL(teacher || student) for logits [T, V]; overwrites `logits` with the gradient of factor times that
    sum, and `teacher` with other values."""
    total, rows = 0.0, max(1, _BLOCK_BYTES // (logits.shape[1] * logits.element_size()))
    for q, p in zip(logits.split(rows), teacher.split(rows), strict=True):
        q -= q.logsumexp(-1, keepdim=True)
        p -= p.logsumexp(-1, keepdim=True)
        probabilities = p.exp()
        total += float(p.sub_(q).mul_(probabilities).sum(-1).double().sum())
        q.exp_().sub_(probabilities).mul_(factor)
    return total
