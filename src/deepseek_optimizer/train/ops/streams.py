"""Hyper-connections (Xie et al. 2026, mHC; `graph.ops.streams`): a block reads a weighted sum of a token's n residual streams,
and its output is added to streams that are mixed by a doubly stochastic matrix.

    w = weights(rms_norm(x) F^T),    y = sum_j w.pre_j x_j,    x'_k = w.post_k block(y) + sum_j w.comb_jk x_j

Only the streams and n^2 + 2 n numbers per token are saved, and all passes over the streams run in chunks of rows that stay in
the cache. Sums are in fp32 (fp64 for fp64) and rounded once; Transformers rounds the weights, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch.autograd.function import once_differentiable

# (numbers of a token [T, M], base [M], scale) -> weights of the streams [T, n], and more tensors that depend on these
Weights = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]

_CHUNK: Final = 1 << 18  # elements of streams at a time: 1 MB in fp32


def read(
    x: torch.Tensor, matrix: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, weights: Weights, eps: float
) -> tuple[torch.Tensor, ...]:
    """What a block reads: (y [T, H] of x's dtype, x, everything but the first of `weights`). The x that is returned is to be
    used from then on, so that all gradients of the streams are summed in one pass.

    Args:
        x: [T, n, H].
        matrix: [M, n H].
        base, scale: passed to `weights`.
        weights: differentiable; called with no more than its arguments, since gradients compute it again.
        eps: of the norm.
    """
    result: tuple[torch.Tensor, ...] = _Read.apply(x, matrix, base, scale, weights, eps)
    return result


def read_reference(
    x: torch.Tensor, matrix: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, weights: Weights, eps: float
) -> tuple[torch.Tensor, ...]:
    """`read` in plain torch."""
    wide = x.to(_exact(x))
    flat = wide.flatten(1)
    normed = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
    pre, *rest = weights(normed @ matrix.to(wide.dtype).T, base, scale)
    return (pre[..., None] * wide).sum(1).to(x.dtype), x, *rest


def write(x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """The streams after a block, [T, n, H] of x's dtype: stream k is post_k y + sum_j comb_jk x_j.

    Args:
        x: [T, n, H].
        y: [T, H] of x's dtype.
        post, comb: [T, n], [T, n, n].
    """
    result: torch.Tensor = _Write.apply(x, y, post, comb)
    return result


def write_reference(x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """`write` in plain torch."""
    wide = _exact(x)
    mixed = comb.to(wide).transpose(1, 2) @ x.to(wide)
    return (mixed + post.to(wide)[..., None] * y.to(wide)[:, None]).to(x.dtype)


def doubly_stochastic(logits: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    """[T, n, n] -> the same shape: a softmax of each row, then Sinkhorn-Knopp: columns and rows are divided by their sums in
    turn, `steps` times, columns last. `eps` is added to the softmax and to all sums. Saves only the argument."""
    result: torch.Tensor = _DoublyStochastic.apply(logits, steps, eps)
    return result


def doubly_stochastic_reference(logits: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    """`doubly_stochastic` in plain torch."""
    y = logits.softmax(-1) + eps
    for axis in _axes(steps):
        y = y / (y.sum(axis + 1, keepdim=True) + eps)
    return y


def _axes(steps: int) -> list[int]:
    """The axes of a matrix along which sums are taken, in order: 0 for columns, 1 for rows."""
    return [0, *[1, 0] * (steps - 1)]


class _DoublyStochastic(torch.autograd.Function):
    """Tokens are the last axis inside, so that sums of n elements are sums of vectors."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.steps, ctx.eps = steps, eps
        y = logits.permute(1, 2, 0).softmax(1).add_(eps)
        for axis in _axes(steps):
            y.div_(y.sum(axis, keepdim=True).add_(eps))
        return y.permute(2, 0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        shares = ctx.saved_tensors[0].permute(1, 2, 0).softmax(1)
        y, passes = shares + ctx.eps, []
        for axis in _axes(ctx.steps):
            total = y.sum(axis, keepdim=True).add_(ctx.eps)
            y = y / total
            passes.append((axis, total, y))
        grad = grads[0].permute(1, 2, 0).contiguous()
        for axis, total, y in reversed(passes):
            grad = (grad - (grad * y).sum(axis, keepdim=True)).div_(total)
        grad = (grad - (grad * shares).sum(1, keepdim=True)).mul_(shares)
        return grad.permute(2, 0, 1), None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, matrix: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, weights: Weights, eps: float
    ) -> tuple[torch.Tensor, ...]:
        exact, (tokens, count, width) = _exact(x), x.shape
        numbers, roots = x.new_empty(tokens, len(matrix), dtype=exact), x.new_empty(tokens, 1, dtype=exact)
        wide = matrix.to(exact)
        for rows in _chunks(x):
            flat = x[rows].to(exact).flatten(1)
            squares = torch.linalg.vector_norm(flat, dim=1, keepdim=True).square_().div_(count * width)
            torch.rsqrt(squares.add_(eps), out=roots[rows])
            torch.mul(flat @ wide.T, roots[rows], out=numbers[rows])
        pre, *rest = weights(numbers, base, scale)
        y = torch.empty_like(x[:, 0])
        for rows in _chunks(x):
            y[rows] = torch.bmm(pre[rows, None], x[rows].to(exact))[:, 0]
        ctx.save_for_backward(x, matrix, base, scale, numbers, roots)
        ctx.weights = weights
        return y, x.view_as(x), *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor, dx: torch.Tensor, *rest: torch.Tensor) -> Any:
        x, matrix, base, scale, numbers, roots = ctx.saved_tensors
        exact, (_, count, width) = _exact(x), x.shape
        dpre = torch.empty(x.shape[:2], dtype=exact, device=x.device)
        for rows in _chunks(x):
            dpre[rows] = torch.bmm(x[rows].to(exact), dy[rows, :, None].to(exact))[..., 0]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (numbers, base, scale)]
            pre, *others = ctx.weights(*leaves)
        dnumbers, dbase, dscale = torch.autograd.grad([pre, *others], leaves, [dpre, *rest])
        projected = (dnumbers * roots).contiguous()
        shrink = (dnumbers * numbers).sum(1, keepdim=True).mul_(roots.square()).div_(-count * width)
        wide, dmatrix = matrix.to(exact), torch.zeros_like(matrix, dtype=exact)
        result, pre = torch.empty_like(x), pre.detach()
        for rows in _chunks(x):
            flat = x[rows].to(exact).flatten(1)
            dmatrix.addmm_(projected[rows].T, flat)
            grad = (flat * shrink[rows]).addmm_(projected[rows], wide).view(-1, count, width)
            grad.addcmul_(pre[rows, :, None], dy[rows, None].to(exact))
            result[rows] = grad.add_(dx[rows])
        return result, dmatrix.to(matrix.dtype), dbase, dscale, None, None


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, y, post, comb)
        out, exact = torch.empty_like(x), _exact(x)
        weights = torch.cat((comb, post[:, None]), 1).to(exact).transpose(1, 2)
        for rows in _chunks(x):
            out[rows] = torch.bmm(weights[rows], torch.cat((x[rows], y[rows, None]), 1).to(exact))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, y, post, comb = ctx.saved_tensors
        exact, count = _exact(x), x.shape[1]
        weights = torch.cat((comb, post[:, None]), 1).to(exact)
        dx, dy, dweights = torch.empty_like(x), torch.empty_like(y), torch.empty_like(weights)
        for rows in _chunks(x):
            grad = grads[0][rows].to(exact)
            both = torch.bmm(weights[rows], grad)
            dx[rows], dy[rows] = both[:, :count], both[:, count]
            dweights[rows] = torch.bmm(torch.cat((x[rows], y[rows, None]), 1).to(exact), grad.transpose(1, 2))
        return dx, dy, dweights[:, count].to(post.dtype), dweights[:, :count].to(comb.dtype)


def _exact(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(x: torch.Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, x[0].numel())) if len(x) else 1
    return (slice(begin, begin + step) for begin in range(0, len(x), step))
