"""Experts kept equally busy without a loss of their own: DeepSeek-V3's balancing (report 2412.19437, section 2.1.2; method of
2408.15664).

A router chooses experts by score + bias, and weighs them by the score alone. After each optimizer step the bias of every expert
that had more than the mean load falls by `rate`, that of one that had less rises by it. The load is that of the whole batch:
all its accumulation steps, all processes, no padding. The biases are buffers of the model (`e_score_correction_bias`), so that
a checkpoint has them and a resumed run goes on with the same ones.

Beside it, if wanted, the report's sequence-wise loss against extremes within one text: alpha * sum over experts i of f_i P_i,
with f_i the share of the text's tokens that chose i (1 when all are equally busy) and P_i the mean of its share of a token's
scores.
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
    """The routers whose biases training may move: those whose weights are trained too. A bias that moved beside a frozen router
    would be lost with the base of an adapter."""
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(getattr(module, BIAS, None), torch.Tensor) and isinstance(weight, torch.Tensor) and weight.requires_grad:
            yield path, module


@dataclass
class _Tokens:
    """Of the model's last call: which tokens are real, and of which text each of them is; None: all, and all of one."""

    real: torch.Tensor | None = None
    text: torch.Tensor | None = None


@dataclass
class _Load:
    """What a router did: tokens of each expert in this step, and in all since the last log; the largest over the mean in each
    of those steps."""

    name: str
    router: nn.Module
    counts: torch.Tensor
    total: torch.Tensor
    ratios: list[float] = field(default_factory=list)


class ExpertBalancing(TrainerCallback):
    """Moves the biases as training goes on, and logs how busy the experts are.

    Logged: `expert_load`, the largest load of an expert over the mean one in the worst layer, of all tokens since the last log
    (1 is perfect; the paper's MaxVio_global is this less 1), the same of each layer as `expert_load_layer_N`, and
    `expert_load_batch`, the mean over steps of what each step's own tokens give (MaxVio_batch), also of the worst layer.

    Args:
        rate: how far a bias moves in a step; V3 had 0.001, and 0 at the end of its training.
        sequence_weight: alpha of the sequence-wise loss; V3 had 0.0001. 0: none.
    """

    def __init__(self, rate: float = 0.001, sequence_weight: float = 0.0) -> None:
        self.rate, self.sequence_weight = rate, sequence_weight
        self._loads: dict[str, _Load] = {}
        self._tokens = _Tokens()
        self._handles: list[RemovableHandle] = []
        self._share = 1.0  # of a step's loss that one forward has

    def attach(self, model: Any, accumulation_steps: int = 1) -> None:
        """Begins to count. The biases become fp32: a step of 0.001 is nothing beside a bias of 0.3 in bf16."""
        self.detach()
        self._share = 1.0 / accumulation_steps
        for path, router in routers(model):
            bias = getattr(router, BIAS)
            bias.data = bias.data.float()
            none = torch.zeros(bias.shape, dtype=torch.int64, device=bias.device)
            self._loads[path] = _Load(_name(path), router, none, none.float())
            self._handles.append(router.register_forward_hook(self._counter(path)))
        if self._loads:
            self._handles.append(model.get_decoder().register_forward_pre_hook(self._see, with_kwargs=True))

    def detach(self) -> None:
        """Counts no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._loads, self._tokens = [], {}, _Tokens()

    def _see(self, model: nn.Module, arguments: Any, kwargs: dict[str, Any]) -> None:
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
            seen, real = self._loads[path], self._tokens.real
            chosen = index if real is None or len(real) != len(index) else index[real]
            seen.counts += chosen.flatten().bincount(minlength=len(seen.counts))
            if not self.sequence_weight or not logits.requires_grad:
                return None
            loss = sequence_loss(logits, index, self._tokens.text, real) * (self.sequence_weight * self._share)
            return logits, _WithLoss.apply(weights, loss), index

        return count

    @torch.no_grad()
    def step(self) -> None:
        """Moves the biases by the loads counted since the last step."""
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
        """Forgets what was counted since the last step: the optimizer has left this one out."""
        for load in self._loads.values():
            load.counts.zero_()

    def statistics(self) -> dict[str, float]:
        """What is logged, of the steps since the last call; empty if there were none."""
        seen = [load for load in self._loads.values() if load.ratios]
        if not seen:
            return {}
        found = {load.name: round(float(load.total.max() / load.total.mean()), 4) for load in seen}
        batches = [sum(load.ratios) / len(load.ratios) for load in seen]
        for load in seen:
            load.ratios.clear()
            load.total.zero_()
        return {"expert_load": max(found.values()), "expert_load_batch": round(max(batches), 4), **found}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.attach(model, args.gradient_accumulation_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # those of evaluation and of the end say nothing of steps
            return
        found = self.statistics()
        logs.update(found)
        if found and state.log_history:
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()


def _name(path: str) -> str:
    """Of a router's load in logs: by the number in its path."""
    number = next((part for part in path.split(".") if part.isdigit()), path)
    return f"expert_load_layer_{number}"


def texts_of(positions: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """int64 [B S], which text each token is of: one begins at each row, and where position_ids begin again."""
    begins = positions.expand(shape) == 0
    begins = torch.cat((torch.ones_like(begins[:, :1]), begins[:, 1:]), 1)
    return begins.flatten().cumsum(0) - 1


def sequence_loss(
    logits: torch.Tensor, index: torch.Tensor, text: torch.Tensor | None = None, real: torch.Tensor | None = None
) -> torch.Tensor:
    """DeepSeek-V3's sequence-wise balance loss (report, equations 17 to 20) without its factor, as the mean over texts.

    Args:
        logits: [T, E], before the sigmoid; differentiable.
        index: int64 [T, K], the chosen experts.
        text: int64 [T], which text each token is of, counted from 0; None: all are of one.
        real: bool [T], tokens that are no padding; None: all.
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
    """Passes x on, and has `loss` take part in the backward as if it had been added to the model's: so it needs no way out
    of the model, and recomputed layers count it once. DeepSeek-V2's published code does the same."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], torch.ones((), dtype=torch.float32, device=grads[0].device)
