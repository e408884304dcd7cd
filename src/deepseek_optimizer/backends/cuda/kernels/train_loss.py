"""The cross entropy of rows of logits, and its gradient: two passes over a row, of which the first finds maximum and sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .train_rows import rounded

_BLOCK = 4096


@triton.jit
def train_cross_entropy(
    logits, labels, losses, gradient, factor, columns, NEEDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """losses = log(sum(exp(x))) - x[label], and if NEEDED gradient = factor (softmax(x) - onehot(label)). Grid (rows).

    Args:
        logits: float32 [rows, columns], contiguous.
        labels: int64 [rows], columns.
        losses: float32 [rows].
        gradient: bf16 or float32 like logits, which it may be.
    """
    row = tl.program_id(0).to(tl.int64)
    begin, label = row * columns, tl.load(labels + row)
    own = tl.load(logits + begin + label)  # before the sums, at which threads wait: the gradient may overwrite it
    largest = tl.full([BLOCK], float("-inf"), tl.float32)  # of each lane
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(0, columns, BLOCK):
        column = at + tl.arange(0, BLOCK)
        x = tl.load(logits + begin + column, mask=column < columns, other=float("-inf"))
        above = tl.maximum(largest, x)
        known = (above > float("-inf")) | (x != x)  # otherwise -inf - -inf
        total = tl.where(known, total * tl.exp(largest - above) + tl.exp(x - above), total)
        largest = above
    top = tl.max(largest, 0)
    total = tl.where(largest > float("-inf"), total * tl.exp(largest - top), total)
    whole = tl.sum(total, 0)
    tl.store(losses + row, tl.log(whole) + (top - own))
    if NEEDED:
        for at in range(0, columns, BLOCK):
            column = at + tl.arange(0, BLOCK)
            x = tl.load(logits + begin + column, mask=column < columns, other=0.0)
            share = tl.div_rn(tl.exp(x - top), whole)
            value = factor * (share - tl.where(column == label, 1.0, 0.0))
            tl.store(gradient + begin + column, rounded(value, gradient), mask=column < columns)


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, factor: float | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of rows, float32 [T], and the gradient of `factor` times their sum (None: it is undefined).

    Args:
        logits: float32 [T, V], contiguous; overwritten if the gradient is float32.
        labels: int64 [T].
        dtype: of the gradient, bf16 or float32.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    gradient = logits if factor is None or dtype == torch.float32 else torch.empty_like(logits, dtype=dtype)
    if len(logits):
        block = min(_BLOCK, triton.next_power_of_2(logits.shape[1]))
        train_cross_entropy[(len(logits),)](
            logits, labels.contiguous(), losses, gradient, 0.0 if factor is None else factor, logits.shape[1],
            NEEDED=factor is not None, BLOCK=block, num_warps=max(1, block // 512),
        )  # fmt: skip
    return losses, gradient
