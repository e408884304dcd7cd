"""Causal language models whose head and loss are one op: logits never stand in memory as a whole."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from ...integration.compat import causal_output
from .linear import is_plain
from .plain_ops import linear_cross_entropy

# Those whose logits are the head's product and nothing more (no cap, no scale), and whose loss is Transformers' causal one.
FAMILIES: Final = (
    "llama", "mistral", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3", "deepseek_v32", "youtu", "qwen2_moe", "qwen3_moe",
)  # fmt: skip
_CHUNK_BYTES: Final = 32 << 20


class TrainedCausalLM(nn.Module):
    """A causal model that answers labels with their loss alone; a mixin before Transformers' own class.

    `skip_logits` says whether to (None: in training); without labels, or where logits are wanted, Transformers' own forward
    runs. The argument's name is that of Liger-Kernel, which Transformers passes where it is in use.
    """

    model: nn.Module
    lm_head: nn.Module
    config: Any

    @staticmethod
    def fits(module: nn.Module) -> bool:
        children = {name for name, _ in module.named_children()}
        known = getattr(getattr(module, "config", None), "model_type", None) in FAMILIES
        return known and {"model", "lm_head"} <= children and getattr(module, "loss_type", None) == "ForCausalLM"

    def forward(self, *args: Any, labels: Any = None, skip_logits: bool | None = None, **kwargs: Any) -> Any:
        skips = self.training if skip_logits is None else skip_logits
        if labels is None or not skips or getattr(self.config, "output_router_logits", False) or not loss_is_fused(self):
            return super().forward(*args, labels=labels, **kwargs)
        how = {name: kwargs.pop(name, None) for name in ("num_items_in_batch", "shift_labels", "ignore_index")}
        as_tuple = not kwargs.pop("return_dict", self.config.return_dict)
        kwargs.pop("logits_to_keep", None)
        outputs = self.model(*args, **kwargs, return_dict=True)
        loss = self._loss(outputs.last_hidden_state, labels, **how)
        result = causal_output(cache=None, loss=loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
        return result.to_tuple() if as_tuple else result

    def _loss(
        self, hidden: torch.Tensor, labels: Any, num_items_in_batch: Any, shift_labels: Any, ignore_index: int | None
    ) -> torch.Tensor:
        """The loss of Transformers' `ForCausalLMLoss`: of the next token, a mean over what counts, or a sum over the number of
        items given."""
        ignored = -100 if ignore_index is None else ignore_index
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignored)[..., 1:]
        rows, wanted = hidden.reshape(-1, hidden.shape[-1]), shift_labels.reshape(-1).to(hidden.device)
        items = None if num_items_in_batch is None else float(num_items_in_batch)
        if is_plain(self.lm_head):
            return linear_cross_entropy(rows, self.lm_head.weight, wanted, ignore_index=ignored, num_items=items)
        result: torch.Tensor = _FrozenHeadLoss.apply(rows, self.lm_head, wanted, ignored, items)
        return result


def loss_is_fused(model: Any) -> bool:
    """Whether the loss can be made with the head in one go: a plain product, or a frozen head of whatever form."""
    head = model.lm_head
    return is_plain(head) or not any(parameter.requires_grad for parameter in head.parameters())


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy through a head that is called as the module it is (packed weights, biases) and has no gradient of its own.

    By pieces of rows: each makes its logits, its part of the loss and the gradient of its hidden states before the next begins.
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
            if grads is not None:
                grads[part] = torch.autograd.grad(loss / items, x)[0] if items else 0
        ctx.save_for_backward(*(() if grads is None else (grads,)))
        return total / items  # 0 / 0 where nothing counts, as torch has it

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        return ctx.saved_tensors[0] * upstream[0].to(ctx.saved_tensors[0].dtype), None, None, None, None
