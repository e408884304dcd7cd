"""Hyper-connections: the weights of residual streams, and streams collapsed to a block's input and expanded by its output.
`graph/ops/streams.py` has the formulas.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # columns of a program


@triton.jit
def mixing_weights(
    x, bias, scale, out, eps, N: tl.constexpr, STEPS: tl.constexpr, MIXED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The weights of a token's streams; see op `stream_weights`. Grid (tokens). The output may be x.

    Args:
        x, out: float32 [T, N], or if MIXED [T, (2 + N) * N].
        bias: float32, as many as a row of x. scale: float32 [1], if MIXED [3].
        BLOCK: a power of two >= N.
    """
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    width: tl.constexpr = (2 + N) * N if MIXED else N
    row, target, one = x + token * width, out + token * width, i < N
    before = tl.load(row + i, mask=one, other=0.0) * tl.load(scale) + tl.load(bias + i, mask=one, other=0.0)
    if MIXED:
        after = tl.load(row + N + i, mask=one, other=0.0) * tl.load(scale + 1) + tl.load(bias + N + i, mask=one, other=0.0)
        place, real = 2 * N + i[:, None] * N + i[None, :], one[:, None] & one[None, :]
        mix = tl.load(row + place, mask=real, other=0.0) * tl.load(scale + 2) + tl.load(bias + place, mask=real, other=0.0)
        mix = tl.where(real, mix, float("-inf"))
        mix = tl.exp(mix - tl.where(one, tl.max(mix, 1), 0.0)[:, None])
        mix = tl.where(real, mix / tl.where(one, tl.sum(mix, 1), 1.0)[:, None] + eps, 0.0)
        mix = tl.where(real, mix / (tl.sum(mix, 0) + eps)[None, :], 0.0)
        for _ in range(STEPS - 1):
            mix = tl.where(real, mix / (tl.sum(mix, 1) + eps)[:, None], 0.0)
            mix = tl.where(real, mix / (tl.sum(mix, 0) + eps)[None, :], 0.0)
        tl.store(target + N + i, 2.0 * tl.sigmoid(after), mask=one)
        tl.store(target + place, mix, mask=real)
    tl.store(target + i, tl.sigmoid(before) + eps, mask=one)


def weights(
    x: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, streams: int, steps: int, eps: float
) -> None:
    """See `mixing_weights`."""
    if len(x):
        block = triton.next_power_of_2(streams)
        mixing_weights[(len(x),)](
            x, bias, scale, out, eps, N=streams, STEPS=steps, MIXED=x.shape[1] > streams, BLOCK=block,
            num_warps=1 if block <= 32 else 4,
        )  # fmt: skip


@triton.jit
def collapse_rows(streams, weights, out, width, weights_width, N: tl.constexpr, BLOCK: tl.constexpr):
    """out = sum over i of pre_i S_i. Grid (tokens, blocks of columns).

    Args:
        streams: float32 [T, N * width].
        weights: float32 [T, weights_width], `pre` first.
        out: float32 [T, width].
    """
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(N):
        value = tl.load(streams + (token * N + i) * width + column, mask=column < width, other=0.0)
        total += tl.load(weights + token * weights_width + i) * value
    tl.store(out + token * width + column, total, mask=column < width)


def collapse(streams: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """See `collapse_rows`."""
    tokens, width = out.shape
    if tokens:
        collapse_rows[(tokens, triton.cdiv(width, _BLOCK))](
            streams, weights, out, width, weights.shape[1], N=streams.shape[1] // width, BLOCK=_BLOCK, num_warps=4
        )  # fmt: skip


@triton.jit
def expand_rows(streams, weights, y, out, width, N: tl.constexpr, BLOCK: tl.constexpr):
    """out_k = post_k y + sum over j of comb_jk S_j. Grid (tokens, blocks of columns, N).

    Args:
        streams, out: float32 [T, N * width].
        weights: float32 [T, (2 + N) * N]: pre, post, comb row by row.
        y: float32 [T, width].
    """
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k, inside = tl.program_id(2), column < width
    own = weights + token * ((2 + N) * N)
    total = tl.load(own + N + k) * tl.load(y + token * width + column, mask=inside, other=0.0)
    for j in range(N):
        value = tl.load(streams + (token * N + j) * width + column, mask=inside, other=0.0)
        total += tl.load(own + 2 * N + j * N + k) * value
    tl.store(out + (token * N + k) * width + column, total, mask=inside)


def expand(streams: torch.Tensor, weights: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    """See `expand_rows`."""
    tokens, width = y.shape
    if tokens:
        count = streams.shape[1] // width
        expand_rows[(tokens, triton.cdiv(width, _BLOCK), count)](
            streams, weights, y, out, width, N=count, BLOCK=_BLOCK, num_warps=4
        )  # fmt: skip
