"""Auxiliary-loss-free load balancing of experts (DeepSeek-V3 report, arXiv 2412.19437, section 2.1.2; arXiv 2408.15664).

A router chooses experts by score + bias, and weights them by the score alone. After each optimizer step, the bias of an
expert with more than the mean load is lowered by `rate`, and that of an expert with less is raised by it. The load counts all
tokens of the batch except padding, over all accumulation steps and processes. The biases are buffers
(`e_score_correction_bias`), so checkpoints contain them and a resumed run continues with them.

Optionally, the report's sequence-wise balance loss discourages imbalance within one text: alpha * sum over experts i of f_i
P_i, where f_i is the share of the text's tokens that chose expert i (1 under equal load) and P_i the mean of the expert's share
of a token's scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

BIAS = "e_score_correction_bias"


def routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The routers whose biases may be updated: those whose weights are trained too. An adapter is saved without the base model,
    so the updated bias of a frozen router would be lost."""
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(getattr(module, BIAS, None), torch.Tensor) and isinstance(weight, torch.Tensor) and weight.requires_grad:
            yield path, module


@dataclass
class _Tokens:
    """The tokens of the model's last forward pass.

    Attributes:
        real: bool [T], False for padding; None: there is none.
        text: int64 [T], the index of each token's text; None: one text.
    """

    real: torch.Tensor | None = None
    text: torch.Tensor | None = None


@dataclass
class _Load:
    """The load of a router's experts.

    Attributes:
        counts: tokens of each expert in the current step.
        total: tokens of each expert since the last log.
        ratios: largest over mean load, for each step since the last log.
    """

    name: str
    router: nn.Module
    counts: torch.Tensor
    total: torch.Tensor
    ratios: list[float] = field(default_factory=list)


class ExpertBalancing(TrainerCallback):
    """Updates the biases during training and logs the load of the experts.

    Logged values: `expert_load_layer_N`, the largest load of an expert over the mean load, for all tokens since the last log
    (1 is perfect balance; the paper's MaxVio_global is this minus 1); `expert_load`, its maximum over the layers; and
    `expert_load_batch`, the same ratio computed per step and averaged over steps (MaxVio_batch), maximum over the layers.

    Args:
        rate: change of a bias per step. DeepSeek-V3 used 0.001, and 0 at the end of training.
        sequence_weight: alpha of the sequence-wise loss; DeepSeek-V3 used 0.0001. 0: off.
    """

    def __init__(self, rate: float = 0.001, sequence_weight: float = 0.0) -> None:
        self.rate, self.sequence_weight = rate, sequence_weight
        self._loads: dict[str, _Load] = {}
        self._tokens = _Tokens()
        self._handles: list[RemovableHandle] = []
        self._share = 1.0  # share of one forward pass in a step's loss

    def attach(self, model: Any, accumulation_steps: int = 1) -> None:
        """Starts counting. Converts the biases to fp32: adding 0.001 to a bias of 0.3 has no effect in bf16."""
        self.detach()
        self._share = 1.0 / accumulation_steps
        for path, router in routers(model):
            bias = getattr(router, BIAS)
            bias.data = bias.data.float()
            none = torch.zeros(bias.shape, dtype=torch.int64, device=bias.device)
            self._loads[path] = _Load(_name(path), router, none, none.float())
            self._handles.append(router.register_forward_hook(self._counter(path)))
        if self._loads:
            self._handles.append(model.get_decoder().register_forward_pre_hook(self._record_batch, with_kwargs=True))

    def detach(self) -> None:
        """Stops counting."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._loads, self._tokens = [], {}, _Tokens()

    def _record_batch(self, model: nn.Module, arguments: Any, kwargs: dict[str, Any]) -> None:
        ids, mask, positions = (kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        real = mask.bool().flatten() if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not mask.all() else None
        text = None
        if self.sequence_weight and isinstance(ids, torch.Tensor):
            text = texts_of(
                positions if positions is not None else torch.arange(ids.shape[1], device=ids.device, dtype=torch.int64),
                ids.shape,
            )
        self._tokens = _Tokens(real, text)

    def _counter(self, path: str) -> Any:
        def count(router: nn.Module, arguments: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Any:
            if not router.training:
                return None
            logits, weights, index = output
            load, real = self._loads[path], self._tokens.real
            chosen = index if real is None or len(real) != len(index) else index[real]
            load.counts += chosen.flatten().bincount(minlength=len(load.counts))
            if not self.sequence_weight or not logits.requires_grad:
                return None
            loss = sequence_loss(logits, index, self._tokens.text, real) * (self.sequence_weight * self._share)
            return logits, _WithLoss.apply(weights, loss), index

        return count

    @torch.no_grad()
    def step(self) -> None:
        """Updates the biases from the loads counted since the last step."""
        for load in self._loads.values():
            counts = load.counts.float()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(counts)
            load.counts.zero_()
            if not counts.any():
                continue
            mean = counts.mean()
            load.ratios.append(float(counts.max() / mean))
            load.total += counts
            getattr(load.router, BIAS).add_(torch.sign(mean - counts), alpha=self.rate)

    def drop(self) -> None:
        """Discards the loads counted since the last step, which the optimizer skipped."""
        for load in self._loads.values():
            load.counts.zero_()

    def statistics(self) -> dict[str, float]:
        """The values to log, for the steps since the last call; empty if there were none."""
        loads = [load for load in self._loads.values() if load.ratios]
        if not loads:
            return {}
        ratios = {load.name: round(float(load.total.max() / load.total.mean()), 4) for load in loads}
        batches = [sum(load.ratios) / len(load.ratios) for load in loads]
        for load in loads:
            load.ratios.clear()
            load.total.zero_()
        return {"expert_load": max(ratios.values()), "expert_load_batch": round(max(batches), 4), **ratios}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.attach(model, args.gradient_accumulation_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # logged by evaluation or at the end of training
            return
        loads = self.statistics()
        logs.update(loads)
        if loads and state.log_history:
            state.log_history[-1].update(loads)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()


def _name(path: str) -> str:
    """The name of a router's load in logs, by the layer number in its path."""
    number = next((part for part in path.split(".") if part.isdigit()), path)
    return f"expert_load_layer_{number}"


def texts_of(positions: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """int64 [B S], the index of each token's text. A text begins at each row, and where position_ids restart at 0."""
    begins = positions.expand(shape) == 0
    begins = torch.cat((torch.ones_like(begins[:, :1]), begins[:, 1:]), 1)
    return begins.flatten().cumsum(0) - 1


def sequence_loss(
    logits: torch.Tensor, index: torch.Tensor, text: torch.Tensor | None = None, real: torch.Tensor | None = None
) -> torch.Tensor:
    """The sequence-wise balance loss (DeepSeek-V3 report, equations 17 to 20) without its factor alpha, averaged over texts.

    Args:
        logits: [T, E], before the sigmoid; differentiable.
        index: int64 [T, K], the chosen experts.
        text: int64 [T], the index of each token's text, from 0; None: one text.
        real: bool [T], False for padding; None: there is none.

    Returns: fp32 scalar.
    """
    text = torch.zeros(len(logits), dtype=torch.int64, device=logits.device) if text is None else text
    if real is not None:
        logits, index, text = logits[real], index[real], text[real]
    count, chosen = int(text.max()) + 1, index.shape[1]
    scores = logits.float().sigmoid()
    scores = scores / scores.sum(-1, keepdim=True)
    picked = torch.zeros_like(scores).scatter_(1, index, 1.0)
    length = text.bincount(minlength=count)
    f = torch.zeros(count, scores.shape[1], device=scores.device, dtype=torch.float32).index_add_(0, text, picked) * (
        scores.shape[1] / chosen
    )
    p = torch.zeros_like(f).index_add_(0, text, scores)
    each = (f * p).sum(-1) / length.clamp(min=1).float().square()
    return each.sum() / (length > 0).sum()


class _WithLoss(torch.autograd.Function):
    """Returns x, and gives `loss` a gradient of 1 in the backward pass, as if it had been added to the model's loss.

    The loss need not be passed out of the model, and recomputed layers count it once. DeepSeek-V2's published code does the
    same.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], torch.ones((), dtype=torch.float32, device=grads[0].device)
