"""The loss of hidden states through a head, by pieces of rows: logits never stand in memory as a whole.

Each piece makes its logits, its part of the loss, and, in the place of its logits, their gradient, from which those of the
hidden states and of the head follow at once; the backward only scales them. So the head's three products are made once, and
what is kept is as large as hidden states and head (Hsu and others, "Liger Kernel", arXiv 2410.10989, section 3.2). Rows without
a label are left out before the first product.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.autograd.function import once_differentiable

from ...backends.cpu.buffers import address
from ...errors import ConfigError
from . import native
from .linear import gradient_place
from .product import product
from .scale import scale_into

_PIECE_BYTES: Final = 64 << 20  # of logits in fp32
# Up to so many pieces the head's gradient is summed in its own dtype: in bf16 it is off by 0.33% after 7 pieces (of 304 rows),
# by 0.17% if it is summed in fp32 and rounded once. That would take another 2 to 4 bytes a weight where memory is fullest.
_FEW_PIECES: Final = 8


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    num_items: float | torch.Tensor | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """fp32 scalar (fp64 for fp64): the cross entropies of labels by the logits hidden weight^T, summed, over num_items.

    Args:
        hidden: [..., H].
        weight: [V, H]. If it has a `main_grad`, its gradient is added to that, and none is given to torch.
        labels: [...], integers below V, of hidden's rows; nothing is shifted.
        ignore_index: the label of rows that do not count.
        num_items: None: how many labels count. Where none does the loss is 0, and so are its gradients.
        chunk: rows of a piece; None: as many as have 64 MB of logits.

    Raises:
        ConfigError: a label that the head has no row for.
        ValueError: shapes that do not fit each other.
    """
    if hidden.shape[:-1] != labels.shape or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        shapes = f"hidden is {list(hidden.shape)}, weight {list(weight.shape)}, labels {list(labels.shape)}"
        raise ValueError(f"linear_cross_entropy: {shapes}: they must be [..., H], [V, H] and [...]")
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    counted = flat != ignore_index
    items = float(num_items) if num_items is not None else float(counted.sum())
    if not bool(counted.all()):
        rows, flat = rows[counted], flat[counted]
    _check_labels(flat, weight.shape[0])
    needed = torch.is_grad_enabled() and hidden.requires_grad, torch.is_grad_enabled() and weight.requires_grad
    loss: torch.Tensor = _LinearCrossEntropy.apply(rows, weight, flat, 1 / items if items else 0.0, chunk, needed)
    return loss


def _check_labels(labels: torch.Tensor, rows: int) -> None:
    wrong = (labels < 0) | (labels >= rows)
    if bool(wrong.any()):
        raise ConfigError(
            f"labels hold {int(labels[wrong][0])}, and the head has rows for 0 to {rows - 1}: the tokenizer is not the "
            "model's, or the padding of labels is not ignore_index"
        )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, factor: float, chunk: int | None,
        needed: tuple[bool, bool],
    ) -> torch.Tensor:  # fmt: skip
        dhidden = native.new(hidden.shape, hidden) if needed[0] else None
        dweight: torch.Tensor | None = None
        total = 0.0
        pieces = _pieces(len(hidden), weight.shape[0], chunk)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # one place for all pieces: memory of this size is the system's again with each tensor, and is cleared for the next
        place = native.new((pieces[0].stop if pieces else 0, weight.shape[0]), hidden, wide)
        for part in pieces:
            x = hidden[part]
            logits = product("nt", x, weight, out=place[: len(x)])
            loss, gradient = cross_entropy_(logits, labels[part], factor if any(needed) else None, x.dtype)
            total += loss
            if dhidden is not None:
                product("nn", gradient, weight, out=dhidden[part])
            if needed[1] and dweight is not None:
                product("tn", gradient, x, out=dweight, add=True)
            elif needed[1]:
                dweight = product("tn", gradient, x, dtype=x.dtype if len(pieces) <= _FEW_PIECES else wide)
        if needed[1] and dweight is None:
            dweight = torch.zeros_like(weight)
        if dweight is not None and dweight.dtype != weight.dtype and getattr(weight, "main_grad", None) is None:
            dweight = scale_into(native.new(weight.shape, weight), dweight)
        ctx.gradients, ctx.weight = (dhidden, dweight), gradient_place(weight)
        return torch.tensor(total * factor, dtype=wide, device=hidden.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: its gradients were handed out by the first backward, and are gone")
        (dhidden, dweight), ctx.gradients = ctx.gradients, None
        scale, main = float(upstream), getattr(ctx.weight, "main_grad", None)
        if dweight is not None and main is not None:
            scale_into(main, dweight, scale, add=True)
            dweight = None
        for gradient in (dhidden, dweight):
            if gradient is not None and scale != 1.0:
                scale_into(gradient, gradient, scale)
        return dhidden, dweight, None, None, None, None


def cross_entropy_(
    logits: torch.Tensor, labels: torch.Tensor, factor: float | None, dtype: torch.dtype
) -> tuple[float, torch.Tensor]:
    """The sum of the cross entropies of logits [T, V], which are lost, and the gradient of factor times that.

    Args:
        labels: int64 [T], each a column of the logits.
        factor: None: no gradient is wanted, and what is returned for it means nothing.
        dtype: of the gradient, which may lie where the logits did: bf16 or the logits' own.
    """
    if native.usable(logits) and logits.is_contiguous():
        losses = native.new((len(logits),), logits, torch.float64)
        bf16 = dtype == torch.bfloat16
        _cross_entropy(logits, labels, 0.0 if factor is None else factor, -1 if factor is None else int(bf16), losses)
        gradient = logits.view(dtype)[:, : logits.shape[1]] if bf16 else logits
        return float(losses.sum()), gradient
    scaled = logits.log_softmax(-1)
    loss = -scaled.gather(1, labels[:, None]).double().sum()
    if factor is None:
        return float(loss), logits
    gradient = scaled.exp_()
    gradient[torch.arange(len(labels), device=labels.device, dtype=torch.int64), labels] -= 1
    return float(loss), gradient.mul_(factor).to(dtype)


@torch.library.custom_op("dso::train_cross_entropy", mutates_args=("logits", "losses"), device_types="cpu")
def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, factor: float, gradient: int, losses: torch.Tensor) -> None:
    labels, x = labels.to(torch.int64).contiguous(), native.matrix(logits, "logits")
    columns = address(labels, "labels", torch.int64, logits.shape[:1])
    sums = address(losses, "losses", torch.float64, logits.shape[:1])
    native.call("dso_train_cross_entropy", *logits.shape, x, columns, -1, factor, gradient, sums, logits=logits, losses=losses)


@_cross_entropy.register_fake
def _(logits: torch.Tensor, labels: torch.Tensor, factor: float, gradient: int, losses: torch.Tensor) -> None:
    """It changes `logits` and `losses`, and makes nothing."""


def _pieces(rows: int, columns: int, chunk: int | None) -> list[slice]:
    """Pieces of rows of about one size, that of whole blocks of the products."""
    most = chunk or max(16, _PIECE_BYTES // (4 * columns))
    count = -(-rows // most)
    each = chunk or (-(-rows // (16 * max(count, 1))) * 16)
    return [slice(begin, min(begin + each, rows)) for begin in range(0, rows, max(each, 1))]
