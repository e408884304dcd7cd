"""Loading the experts of a checkpoint when training is resumed. Transformers saves experts one by one but merges them in
memory. `from_pretrained` merges them while loading; Trainer's loading of a checkpoint (5.20 to 5.24) does not, and would
continue with the weights that the model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...checkpoint import Checkpoint, open_checkpoint
from ...checkpoint.stacks import is_stack, matrices_per_expert


def merged_experts(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that merge all experts of a layer, by name."""
    return {name: p for name, p in model.named_parameters() if is_stack(name) and p.ndim == 3 and p.is_floating_point()}


def load_experts(model: torch.nn.Module, folder: Path) -> None:
    """Loads a checkpoint's experts into the merged parameters of a model. Experts stored merged are assumed to be loaded
    already.

    Raises:
        CheckpointError: an expert is missing or has another shape.
    """
    merged = merged_experts(model)
    if not merged or not any(folder.glob("model*.safetensors")):  # a checkpoint of an adapter
        return
    with open_checkpoint(folder) as checkpoint:
        for name, parameter in merged.items():
            if name not in checkpoint.tensors:
                read_stack(checkpoint, name, parameter)


@torch.no_grad()
def read_stack(checkpoint: Checkpoint, name: str, parameter: torch.Tensor) -> None:
    """Fills a merged parameter from a checkpoint, one matrix of one expert at a time. Raises CheckpointError."""
    experts, rows, columns = parameter.shape
    each = matrices_per_expert(name)
    matrices = parameter.view(experts * each, rows // each, columns)
    for part, matrix in zip(checkpoint.parts(name, (experts * each, rows // each, columns)), matrices, strict=True):
        values = checkpoint.read(part.tensor)
        checkpoint.check_finite(part.tensor, values)
        matrix.copy_(values)


class MergedExperts:
    """Mixin for a Trainer that loads merged experts from checkpoints."""

    model: Any
    state: Any

    def load_weights(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super().load_weights(resume_from_checkpoint, model)  # type: ignore[misc]
        load_experts(self.model if model is None else model, Path(resume_from_checkpoint))

    def load_best_weights(self) -> None:
        super().load_best_weights()  # type: ignore[misc]
        load_experts(self.model, Path(self.state.best_model_checkpoint))

    def warn_of_other_weights(self, load_result: Any) -> None:
        """Like Trainer's, but ignores the experts, which `load_experts` loads."""
        merged = merged_experts(self.model)
        stacks = tuple(f"{name.rpartition('.')[0]}." for name in merged)
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in merged]
        load_result.unexpected_keys[:] = [name for name in load_result.unexpected_keys if not name.startswith(stacks or "\0")]
        super().warn_of_other_weights(load_result)  # type: ignore[misc]
