"""Causal language models with head and loss fused, so that the full logits are never in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...integration.compat import causal_output
from ...models.families import traits
from .distillation import Distillation
from .draft_loss import DraftObjective
from .head_loss import head_is_fused, head_loss
from .mtp_loss import MtpObjective
from .mtp_streams import DraftStates


class TrainedCausalLM(nn.Module):
    """Forward of a causal language model that returns the loss but no logits; a mixin for Transformers' class.

    It applies if there are labels and `skip_logits` is True or, by default, the model is in training mode; otherwise
    Transformers' forward runs. `skip_logits` is the argument of Liger-Kernel, which Transformers passes where that is in use.
    """

    model: nn.Module
    lm_head: nn.Module
    config: Any
    mtp: MtpObjective | DraftObjective | None = None
    distillation: Distillation | None = None

    @staticmethod
    def fits(module: nn.Module) -> bool:
        children = {name for name, _ in module.named_children()}
        supported = traits(getattr(module, "config", None)).plain_head
        return supported and {"model", "lm_head"} <= children and getattr(module, "loss_type", None) == "ForCausalLM"

    def forward(self, *args: Any, labels: Any = None, skip_logits: bool | None = None, **kwargs: Any) -> Any:
        skips = self.training if skip_logits is None else skip_logits
        if (
            labels is None
            or not skips
            or getattr(self.config, "output_router_logits", False)
            or not head_is_fused(self.lm_head)
        ):
            return super().forward(*args, labels=labels, **kwargs)
        options = {name: kwargs.pop(name, None) for name in ("num_items_in_batch", "shift_labels", "ignore_index")}
        as_tuple = not kwargs.pop("return_dict", self.config.return_dict)
        kwargs.pop("logits_to_keep", None)
        if isinstance(self.mtp, DraftObjective):
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

            def run() -> torch.Tensor:
                states: torch.Tensor = self.model(*args, **{"use_cache": False, **kwargs}, return_dict=True).last_hidden_state
                return states

            loss = self.mtp.of_text(self, run, ids, labels, options["num_items_in_batch"], kwargs)
            result = causal_output(cache=None, loss=loss, hidden_states=None, attentions=None)
            return result.to_tuple() if as_tuple else result
        with DraftStates(self.model) as states:
            outputs = self.model(*args, **{"use_cache": False, **kwargs}, return_dict=True)
        hidden = outputs.last_hidden_state
        if self.distillation is None:
            loss = self._loss(hidden, labels, **options)
        else:
            inputs = {**kwargs, "input_ids": kwargs["input_ids"] if "input_ids" in kwargs else args[0]}
            loss = self.distillation(self, hidden, labels, inputs, lambda: self._loss(hidden, labels, **options))
        if self.mtp is not None and self.training:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            loss = loss + self.mtp(self, states.of(hidden), ids, labels, options["num_items_in_batch"], kwargs)
        result = causal_output(cache=None, loss=loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
        return result.to_tuple() if as_tuple else result

    def _loss(
        self, hidden: torch.Tensor, labels: Any, num_items_in_batch: Any, shift_labels: Any, ignore_index: int | None
    ) -> torch.Tensor:
        """The next-token loss as in Transformers' `ForCausalLMLoss`: the mean over labels that are not ignored, or the sum
        divided by `num_items_in_batch`."""
        ignored = -100 if ignore_index is None else ignore_index
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignored)[..., 1:]
        rows, wanted = hidden.reshape(-1, hidden.shape[-1]), shift_labels.reshape(-1).to(hidden.device)
        items = None if num_items_in_batch is None else float(num_items_in_batch)
        return head_loss(rows, self.lm_head, wanted, ignored, items)
