"""The report of a trainer: which modules run natively, and the memory that training needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from ..errors import NotEnoughMemoryError
from ..system.memory import free_memory
from .modules.attention import TrainedAttention
from .modules.compressed_attention import TrainedCompressedAttention
from .modules.head import TrainedCausalLM
from .modules.mlp import TrainedMlp
from .modules.norm import TrainedNorm
from .modules.streams import TrainedHyperConnection
from .prepare import Prepared, trainable

_MOMENTS: Final = {"bf16": 4.0, "int8": 2.0 + 8 / 256, "fp32": 8.0}  # bytes per weight, both moments; int8: a scale per block
_CHUNK: Final = 64 << 20  # bytes of the fused head for a chunk of logits and its gradient
_SAMPLED: Final = 64  # examples whose lengths are used to plan memory
_REMEDY: Final = (
    'use optimizer_state="int8", activation_memory="recompute", a smaller per_device_train_batch_size or shorter sequences, '
    "or train an adapter (LoRA)"
)


@dataclass
class MemoryPlan:
    """Bytes of memory that training needs.

    Attributes:
        weights: the model's weights, in the dtype of training.
        masters: the part of the fp32 master weights that the optimizer stores.
        moments: Adam's two moments.
        gradients: the gradients of one pass.
        accumulators: the fp32 sums of gradients over the passes of a step.
        rounded: the rounded weights of quantization-aware training.
        teacher: the weights of the teacher.
        activations: activations that supported modules save for the backward pass; None if the examples' length is unknown.
        tokens: tokens per batch, padding included; not bytes.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    accumulators: int
    activations: int | None
    tokens: int | None
    rounded: int = 0
    teacher: int = 0

    @property
    def total(self) -> int:
        parts = (self.weights, self.masters, self.moments, self.gradients, self.accumulators, self.activations or 0)
        return sum(parts) + self.rounded + self.teacher

    def check(self, held: int) -> None:
        """Raises NotEnoughMemoryError if the free memory is not sufficient.

        Args:
            held: bytes of the plan that are already allocated.
        """
        needed, memory = self.total - held, free_memory()
        if needed > memory.free:
            raise NotEnoughMemoryError("training", needed, memory.free, _REMEDY, memory)

    def __str__(self) -> str:
        named = ("weights", "rounded", "teacher", "masters", "moments", "gradients", "accumulators", "activations")
        parts = [f"{name} {(getattr(self, name) or 0) / 1e6:,.0f} MB" for name in named if getattr(self, name)]
        return f"{self.total / 1e6:,.0f} MB: {', '.join(parts)}"


@dataclass
class TrainingReport:
    """What runs natively in training, what does not, and the memory that training needs.

    Attributes:
        native: number of modules with a native forward, by class name.
        others: number of other modules with weights, by class name.
        attention: name of the attention implementation.
        optimizer: name of the optimizer.
        trained: number of trained parameters.
        weights: number of all parameters.
        fused_loss: whether the loss is computed without the full logits.
        memory: the memory plan.
        notes: what is not optimized and why, one sentence each.
    """

    native: Counter[str]
    others: Counter[str]
    attention: str
    optimizer: str
    trained: int
    weights: int
    fused_loss: bool
    memory: MemoryPlan
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        loss = "fused" if self.fused_loss else "from full logits"
        lines = [
            f"trained    {self.trained:,} of {self.weights:,} weights by {self.optimizer}",
            f"native     {_counted(self.native)}; attention {self.attention}, loss {loss}",
            f"unchanged  {_counted(self.others)}",
            f"memory     {self.memory}",
        ]
        return "\n".join([*lines, *(f"note       {note}" for note in self.notes)])


def _counted(names: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(names.items())) or "nothing"


def plan_memory(
    prepared: Prepared, args: Any, dtype: torch.dtype, tokens: int | None, rounded: int = 0, teacher: int = 0
) -> MemoryPlan:
    """Estimates the memory that training needs.

    Args:
        prepared: the model, prepared for training.
        args: `DeepSeekTrainingArguments`.
        dtype: dtype in which weights are trained.
        tokens: tokens per batch, padding included; None: unknown.
        rounded: number of weights that quantization-aware training rounds.
        teacher: bytes of the teacher.
    """
    model, own = prepared.model, args.own_optimizer
    weights = {id(p): p for p in model.parameters()}.values()
    held = sum(p.numel() * (dtype.itemsize if p.is_floating_point() else p.element_size()) for p in weights)
    count = sum(p.numel() for p in trainable(model))
    split = own and dtype == torch.bfloat16 and args.master_weights == "split"
    return MemoryPlan(
        weights=held,
        masters=2 * count if split else 0,
        moments=round(count * _MOMENTS[args.optimizer_state]) if own else 2 * count * dtype.itemsize,
        gradients=count * dtype.itemsize,
        accumulators=4 * count if args.gradient_accumulation_steps > 1 and own and dtype == torch.bfloat16 else 0,
        activations=None if tokens is None else _activations(prepared, args.activation_memory, dtype, tokens),
        tokens=tokens,
        rounded=rounded * dtype.itemsize,
        teacher=teacher,
    )


def batch_tokens(data: Any, batch_size: int) -> int | None:
    """Tokens per batch, estimated from the lengths of some examples; None if the data set is a stream."""
    try:
        count = len(data)
        lengths = [len(data[i]["input_ids"]) for i in range(0, count, max(1, count // _SAMPLED))]
    except (TypeError, KeyError, IndexError):
        return None
    return max(lengths, default=0) * batch_size or None


def _activations(prepared: Prepared, memory: str, dtype: torch.dtype, tokens: int) -> int:
    model = prepared.model
    modules: list[Any] = list(model.modules())
    widths = sum(_width(module, memory) for module in modules)
    layers = sum(isinstance(module, TrainedMlp) for module in modules) or 1
    if memory == "recompute":  # the input of each layer, and all activations of one layer
        hidden = next((m.weight.numel() for m in modules if isinstance(m, TrainedNorm)), 0)
        widths = hidden * layers + widths // layers
    logits = _CHUNK if prepared.fused_loss else tokens * getattr(model.config, "vocab_size", 0) * (4 + 4 + dtype.itemsize)
    return tokens * widths * dtype.itemsize + logits


def _width(module: Any, memory: str) -> int:
    """Elements per token that a module saves for its backward pass."""
    more = memory != "selective"
    if isinstance(module, TrainedNorm):
        return module.weight.numel() * (2 if more else 1)
    if isinstance(module, TrainedMlp):
        return _columns(module.gate_proj) * (3 if more else 2)
    if isinstance(module, TrainedAttention):
        return 2 * _columns(module.q_proj) + _columns(module.k_proj) + _columns(module.v_proj)  # the output is as wide as q
    if isinstance(module, TrainedCompressedAttention):
        return 3 * _columns(module.q_b_proj) + 2 * module.head_dim  # queries, and outputs before and after they are turned back
    if isinstance(module, TrainedHyperConnection):
        return module.fn.shape[1]
    if isinstance(module, TrainedCausalLM):
        return 2 * getattr(module.config, "hidden_size", 0)  # the last hidden states and their gradient
    return 0


def _columns(projection: Any) -> int:
    return int(projection.out_features)
