"""The teacher of a distillation: a copy of the model that is trained, or another model with the same vocabulary."""

from __future__ import annotations

import copy
from typing import Any, Final

import torch

from ..checkpoint import load_tokenizer, open_checkpoint
from ..errors import CheckpointError, ConfigError, NotEnoughMemoryError
from ..integration.load.resolve import resolve
from ..system.memory import free_memory
from .load_for_training import load_for_training
from .modules.head import TrainedCausalLM
from .modules.linear import is_plain
from .precision import set_training_dtype
from .prepare import Prepared, prepare

SELF: Final = "self"
_REMEDY: Final = "use a smaller teacher, or train without one"


def make_teacher(name: str, model: Any, dtype: torch.dtype) -> Any:
    """A frozen teacher with native forward methods, as large as its weights in `dtype`.

    Args:
        name: `SELF`, or the directory or name of a model.
        model: the model that will be trained, with its original weights and before `prepare`.
        dtype: dtype of the weights.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigError: its vocabulary has another size, or its head is not a plain linear layer.
        NotEnoughMemoryError: its weights do not fit into memory.
    """
    needed, memory = teacher_weights(name, model.num_parameters()) * dtype.itemsize, free_memory()
    if needed > memory.free:
        raise NotEnoughMemoryError("the teacher", needed, memory.free, _REMEDY, memory)
    teacher = copy.deepcopy(model) if name == SELF else load_for_training(resolve(name), dtype)
    set_training_dtype(teacher, dtype)
    ours, theirs = model.config.vocab_size, teacher.config.vocab_size
    if ours != theirs:
        raise ConfigError(f"teacher: {name} has a vocabulary of {theirs:,} tokens, but the model one of {ours:,}; use a "
                          "teacher with the model's vocabulary")  # fmt: skip
    prepared = prepare(teacher.eval().requires_grad_(False))
    check_heads(prepared, f"teacher={name!r}")
    return teacher


def teacher_weights(name: str, own: int) -> int:
    """Number of a teacher's weights, without loading them.

    Args:
        name: as in `make_teacher`.
        own: number of weights of the model that is trained.
    """
    if name == SELF:
        return own
    with open_checkpoint(resolve(name)) as checkpoint:
        return sum(torch.Size(info.shape).numel() for info in checkpoint.tensors.values())


def check_heads(prepared: Prepared, what: str) -> None:
    """ConfigError unless a prepared model is a causal language model whose head is a plain linear layer."""
    model = prepared.model
    heads = [module.lm_head for module in model.modules() if isinstance(module, TrainedCausalLM)]
    if len(heads) != 1 or not is_plain(heads[0]):
        raise ConfigError(
            f"{what}: distillation needs a causal language model with a plain linear head, which this {type(model).__name__} "
            "does not have; train it without a teacher"
        )


def check_tokenizer(name: str, tokenizer: Any) -> None:
    """ConfigError if a teacher's tokenizer has another vocabulary. A teacher without a tokenizer is not checked."""
    with open_checkpoint(resolve(name)) as checkpoint:
        try:
            theirs = load_tokenizer(checkpoint)
        except CheckpointError:
            return
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"teacher: the tokenizer of {name} has another vocabulary than the model's; use a teacher of the "
                          "same family")  # fmt: skip
