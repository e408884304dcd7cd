"""Experts of a checkpoint that is resumed from. Transformers writes them one by one, as they are published, and has them merged
in memory: `from_pretrained` merges them, Trainer's loading of a checkpoint (5.20 to 5.24) does not, and would go on with
whatever the model was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...checkpoint import Checkpoint, open_checkpoint
from ...checkpoint.stacks import is_stack, matrices_per_expert


def merged_experts(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that hold all experts of a layer, by name."""
    return {name: p for name, p in model.named_parameters() if is_stack(name) and p.ndim == 3 and p.is_floating_point()}


def load_experts(model: torch.nn.Module, folder: Path) -> None:
    """Reads a checkpoint's experts into a model that has them merged; those that are stored merged are there already.

    Raises: CheckpointError, where one is missing or of another shape.
    """
    found = merged_experts(model)
    if not found or not any(folder.glob("model*.safetensors")):  # an adapter alone has none
        return
    with open_checkpoint(folder) as checkpoint:
        for name, parameter in found.items():
            if name not in checkpoint.tensors:
                read_stack(checkpoint, name, parameter)


@torch.no_grad()
def read_stack(checkpoint: Checkpoint, name: str, parameter: torch.Tensor) -> None:
    """Fills a merged parameter with what the checkpoint has of it, one expert's matrix at a time."""
    experts, rows, columns = parameter.shape
    each = matrices_per_expert(name)
    pieces = parameter.view(experts * each, rows // each, columns)
    for part, piece in zip(checkpoint.parts(name, (experts * each, rows // each, columns)), pieces, strict=True):
        read = checkpoint.read(part.tensor)
        checkpoint.check_finite(part.tensor, read)
        piece.copy_(read)


class MergedExperts:
    """What a Trainer does about it; a mixin before it."""

    model: Any
    state: Any

    def load_weights(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super().load_weights(resume_from_checkpoint, model)  # type: ignore[misc]
        load_experts(self.model if model is None else model, Path(resume_from_checkpoint))

    def load_best_weights(self) -> None:
        super().load_best_weights()  # type: ignore[misc]
        load_experts(self.model, Path(self.state.best_model_checkpoint))

    def warn_of_other_weights(self, load_result: Any) -> None:
        """Says nothing of what `load_experts` is about to read."""
        merged = merged_experts(self.model)
        stacks = tuple(f"{name.rpartition('.')[0]}." for name in merged)
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in merged]
        load_result.unexpected_keys[:] = [name for name in load_result.unexpected_keys if not name.startswith(stacks or "\0")]
        super().warn_of_other_weights(load_result)  # type: ignore[misc]
