"""The loss of hidden states through a head, in chunks of rows, so that the full logits are never in memory.

For each chunk, the forward pass computes the logits, the loss, the gradient of the logits (in place), and from it the gradients
of the hidden states and of the head. The backward pass only scales them. Thus the head's three products are computed once, and
the saved tensors are as large as hidden states and head (Hsu et al., "Liger Kernel", arXiv 2410.10989, section 3.2). Rows
without a label are removed before the first product.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.autograd.function import once_differentiable

from ...backends.cpu.buffers import address
from ...errors import ConfigError
from . import early_gradients, native, triton_ops
from .product import product

_CHUNK_BYTES: Final = 64 << 20  # fp32 logits of a chunk
# Up to this many chunks, the head's gradient is summed in its own dtype: in bf16, its error is 0.33% after 7 chunks of 304
# rows, against 0.17% if it is summed in fp32 and rounded once, which takes 2 to 4 more bytes per weight at the memory peak.
_FEW_CHUNKS: Final = 8


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    num_items: float | torch.Tensor | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """The cross entropy of the labels under the logits hidden weight^T, summed and divided by `num_items`.

    Args:
        hidden: [..., H].
        weight: [V, H]. If it has a `main_grad`, its gradient is added to that instead of being returned to torch.
        labels: integers [...] below V, one per row of `hidden`; they are not shifted.
        ignore_index: label of rows that do not count.
        num_items: divisor of the sum; None: the number of labels that count. If there are none, loss and gradients are 0.
        chunk: rows per chunk; None: as many as have 64 MB of logits.

    Returns: fp32 scalar (fp64 for fp64 inputs).

    Raises:
        ConfigError: a label is out of range.
        ValueError: shapes do not match.
    """
    if hidden.shape[:-1] != labels.shape or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        shapes = f"hidden is {list(hidden.shape)}, weight {list(weight.shape)}, labels {list(labels.shape)}"
        raise ValueError(f"linear_cross_entropy: {shapes}; they must be [..., H], [V, H] and [...]")
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    valid = flat != ignore_index
    items = float(num_items) if num_items is not None else float(valid.sum())
    if not bool(valid.all()):
        rows, flat = rows[valid], flat[valid]
    _check_labels(flat, weight.shape[0])
    needed = torch.is_grad_enabled() and hidden.requires_grad, torch.is_grad_enabled() and weight.requires_grad
    loss: torch.Tensor = _LinearCrossEntropy.apply(rows, weight, flat, 1 / items if items else 0.0, chunk, needed)
    return loss


def _check_labels(labels: torch.Tensor, rows: int) -> None:
    invalid = (labels < 0) | (labels >= rows)
    if bool(invalid.any()):
        raise ConfigError(
            f"labels contain {int(labels[invalid][0])}, but the vocabulary is 0 to {rows - 1}; use the model's own tokenizer, "
            "and ignore_index to pad labels"
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
        chunks = chunks_of(len(hidden), weight.shape[0], chunk)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # one buffer for all chunks: the system clears newly mapped memory, which is slow at this size
        buffer = native.new((chunks[0].stop if chunks else 0, weight.shape[0]), hidden, wide)
        for part in chunks:
            x = hidden[part]
            logits = product("nt", x, weight, out=buffer[: len(x)])
            loss, gradient = cross_entropy_(logits, labels[part], factor if any(needed) else None, x.dtype)
            total += loss
            if dhidden is not None:
                product("nn", gradient, weight, out=dhidden[part])
            if needed[1] and dweight is not None:
                product("tn", gradient, x, out=dweight, add=True)
            elif needed[1]:
                dweight = product("tn", gradient, x, dtype=x.dtype if len(chunks) <= _FEW_CHUNKS else wide)
        if needed[1] and dweight is None:
            dweight = torch.zeros_like(weight)
        early_gradients.keep(ctx, weight, dhidden, dweight)
        return torch.tensor(total * factor, dtype=wide, device=hidden.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        return *early_gradients.scaled(ctx, upstream, "linear_cross_entropy"), None, None, None, None


def cross_entropy_(
    logits: torch.Tensor, labels: torch.Tensor, factor: float | None, dtype: torch.dtype
) -> tuple[float, torch.Tensor]:
    """The sum of the cross entropies of logits [T, V], and the gradient of factor times that sum. Overwrites the logits.

    Args:
        labels: int64 [T], indices of columns of the logits.
        factor: None: no gradient is computed, and the returned one is undefined.
        dtype: dtype of the gradient, bf16 or that of the logits. The gradient may share memory with the logits.
    """
    if native.usable(logits) and logits.is_contiguous():
        losses = native.new((len(logits),), logits, torch.float64)
        bf16 = dtype == torch.bfloat16
        _cross_entropy(logits, labels, 0.0 if factor is None else factor, -1 if factor is None else int(bf16), losses)
        gradient = logits.view(dtype)[:, : logits.shape[1]] if bf16 else logits
        return float(losses.sum()), gradient
    if logits.dtype == torch.float32 and logits.is_contiguous() and triton_ops.usable(logits):
        return triton_ops.cross_entropy_(logits, labels, factor, dtype)
    log_probabilities = logits.log_softmax(-1)
    loss = -log_probabilities.gather(1, labels[:, None]).double().sum()
    if factor is None:
        return float(loss), logits
    gradient = log_probabilities.exp_()
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
    """Changes `logits` and `losses` in place; has no output."""


def chunks_of(rows: int, columns: int, chunk: int | None) -> list[slice]:
    """Chunks of rows of similar size, a multiple of the products' block size."""
    max_rows = chunk or max(16, _CHUNK_BYTES // (4 * columns))
    count = -(-rows // max_rows)
    size = chunk or (-(-rows // (16 * max(count, 1))) * 16)
    return [slice(begin, min(begin + size, rows)) for begin in range(0, rows, max(size, 1))]
