"""The loss of hidden states through a head, in chunks of rows, so that the full logits are never in memory."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.cross_entropy import linear_cross_entropy
from ..shards import gathers
from .linear import TrainedLinear, is_plain

_CHUNK_BYTES: Final = 32 << 20


def head_loss(
    hidden: torch.Tensor, head: Any, labels: torch.Tensor, ignore_index: int, num_items: float | None
) -> torch.Tensor:
    """The cross entropy of the labels under the logits head(hidden), as an fp32 scalar.

    Args:
        hidden: [T, H].
        head: unless `head_is_fused(head)`, the full logits are computed after all.
        labels: int64 [T].
        ignore_index: label of rows that do not count.
        num_items: divisor of the sum; None: the number of labels that count. If there are none, the loss is 0.
    """
    op = partial(linear_cross_entropy, labels=labels, ignore_index=ignore_index, num_items=num_items)
    if is_plain(head):
        return op(hidden, head.weight)
    if _is_sharded(head):
        loss: torch.Tensor = head(hidden, op)
        return loss
    if not head_is_fused(head):
        total = F.cross_entropy(head(hidden).float(), labels, ignore_index=ignore_index, reduction="sum")
        items = num_items if num_items is not None else int((labels != ignore_index).sum())
        return total / items if items else total
    result: torch.Tensor = _FrozenHeadLoss.apply(hidden, head, labels, ignore_index, num_items)
    return result


def head_is_fused(head: nn.Module) -> bool:
    """Whether head and loss can be fused: the head is a plain product, or frozen."""
    return is_plain(head) or _is_sharded(head) or not any(parameter.requires_grad for parameter in head.parameters())


def _is_sharded(head: nn.Module) -> bool:
    """Whether a head is a plain product but for the hooks by which FSDP2 gathers its weight around a call."""
    others = (
        head._backward_hooks or head._backward_pre_hooks or len(head._forward_hooks) > 1 or len(head._forward_pre_hooks) > 1
    )
    return isinstance(head, TrainedLinear) and head.bias is None and gathers(head) and not others


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross entropy through a frozen head, which is called as a module (it may have packed weights or a bias).

    Works in chunks of rows: each computes its logits, its part of the loss, and the gradient of its hidden states.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: Any, labels: torch.Tensor, ignore_index: int, num_items: float | None
    ) -> torch.Tensor:
        needed = ctx.needs_input_grad[0]
        items = num_items if num_items is not None else int((labels != ignore_index).sum())
        total, grads = hidden.new_zeros((), dtype=torch.float32), torch.zeros_like(hidden) if needed else None
        rows = max(1, _CHUNK_BYTES // (4 * head.out_features))
        for begin in range(0, len(hidden), rows):
            part = slice(begin, begin + rows)
            with torch.set_grad_enabled(needed):
                x = hidden[part].detach().requires_grad_(needed)
                loss = F.cross_entropy(head(x).float(), labels[part], ignore_index=ignore_index, reduction="sum")
            total += loss.detach()
            if grads is not None and items:
                grads[part] = torch.autograd.grad(loss, x)[0] / items
        ctx.save_for_backward(*(() if grads is None else (grads,)))
        return total / items if items else total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        return ctx.saved_tensors[0] * upstream[0].to(ctx.saved_tensors[0].dtype), None, None, None, None
