"""Loading what Transformers converts, when training is resumed. It merges experts, and gives published names to some families'
tensors. `from_pretrained` converts while loading, and `save_pretrained` converts back; Trainer's loading of a checkpoint
(5.20 to 5.24) does not, and would continue with the weights that the model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ...checkpoint import Checkpoint, open_checkpoint
from ...checkpoint.published_names import mtp_as_layer, parameter_name
from ...checkpoint.stacks import is_stack, matrices_per_expert


def merged_experts(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that merge all experts of a layer, by name."""
    return {name: p for name, p in model.named_parameters() if is_stack(name) and p.ndim == 3 and p.is_floating_point()}


@torch.no_grad()
def load_converted(model: torch.nn.Module, folder: Path) -> None:
    """Loads the parameters and buffers of a model that a checkpoint has under other names, or in parts. Those stored by their
    own names are assumed to be loaded already.

    Raises:
        CheckpointError: an expert is missing or has another shape.
    """
    stored = _stored_names(folder)
    converted = {name: tensor for name, tensor in model.state_dict().items() if name not in stored}
    if not stored or not converted:  # no names: a checkpoint of an adapter
        return
    merged = merged_experts(model)
    with open_checkpoint(folder) as checkpoint:
        for name, tensor in converted.items():
            if name in checkpoint.tensors:
                tensor.copy_(checkpoint.read(name))
            elif name in merged:
                read_stack(checkpoint, name, merged[name])


def _stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


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


class ConvertedWeights:
    """Mixin for a Trainer that loads what Transformers converts from checkpoints."""

    model: Any
    state: Any

    def load_weights(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super().load_weights(resume_from_checkpoint, model)  # type: ignore[misc]
        load_converted(self.model if model is None else model, Path(resume_from_checkpoint))

    def load_best_weights(self) -> None:
        super().load_best_weights()  # type: ignore[misc]
        load_converted(self.model, Path(self.state.best_model_checkpoint))

    def warn_of_other_weights(self, load_result: Any) -> None:
        """Like Trainer's, but ignores what `load_converted` loads."""
        merged, config = merged_experts(self.model), self.model.config.to_dict()
        family = config.get("model_type")
        stacks = tuple(f"{name.rpartition('.')[0]}." for name in merged)
        renamed = {name: parameter_name(mtp_as_layer(name, config), family) for name in load_result.unexpected_keys}
        found = self.model.state_dict().keys() & renamed.values()
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in merged and name not in found]
        load_result.unexpected_keys[:] = [
            name for name, own in renamed.items() if own not in found and not own.startswith(stacks or "\0")
        ]
        super().warn_of_other_weights(load_result)  # type: ignore[misc]
