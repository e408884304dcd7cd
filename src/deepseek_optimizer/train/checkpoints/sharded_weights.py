"""Loading the weights of a checkpoint into a sharded model (FSDP2). Checkpoints contain full tensors: each process reads them
all, and keeps its own shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ...checkpoint import open_checkpoint
from ...checkpoint.published_names import mtp_as_layer, parameter_name
from ...errors import CheckpointError
from ...integration.training.modules import is_tied
from .converted import merged_experts, read_stack

_ADAPTER = "adapter_model.safetensors"  # PEFT's name


def load_shards(directory: Path, model: torch.nn.Module) -> None:
    """Loads a checkpoint's weights, or those of its adapter if the model has one.

    Raises:
        CheckpointError: tensors are missing, unexpected, or of another shape.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    adapter = hasattr(model, "peft_config")
    state, unexpected = _adapter_weights(directory, model) if adapter else _model_weights(directory, model)
    result = set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad or not adapter}
    missing = [name for name in result.missing_keys if name in wanted and not is_tied(model, name)]
    unexpected += result.unexpected_keys
    if missing or unexpected:
        raise CheckpointError(
            f"does not fit this model: {len(missing)} tensors are missing, {len(unexpected)} are unexpected",
            file=directory, tensor=next(iter([*missing, *unexpected])),
        )  # fmt: skip


def _model_weights(directory: Path, model: Any) -> tuple[dict[str, Any], list[str]]:
    """The weights by the model's names, and the names in the checkpoint that are not the model's. What Transformers converts
    is converted as in `converted`."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        stored |= load_file(file)
    wanted = model.state_dict().keys()
    state: dict[str, Any] = {name: tensor for name, tensor in stored.items() if name in wanted}
    others = stored.keys() - state.keys()
    if not others:
        return state, []
    merged = merged_experts(model)
    with open_checkpoint(directory) as checkpoint:
        for name in wanted - state.keys():
            if name in checkpoint.tensors:
                state[name] = checkpoint.read(name)
            elif name in merged:
                state[name] = torch.empty(merged[name].shape, dtype=merged[name].dtype, device="cpu")
                read_stack(checkpoint, name, state[name])
    config = model.config.to_dict()
    names = {name: parameter_name(mtp_as_layer(name, config), config.get("model_type")) for name in others}
    stacks = tuple(f"{name.rpartition('.')[0]}." for name in merged)
    return state, sorted(name for name, own in names.items() if own not in state and not own.startswith(stacks or "\0"))


def _adapter_weights(directory: Path, model: Any) -> tuple[dict[str, Any], list[str]]:
    """The weights of the active adapter by the model's names, and the names in the checkpoint that are not the model's. PEFT
    leaves the adapter's name out of the names that it saves."""
    adapter = f".{model.active_adapter}"
    saved = {
        name.replace(f".modules_to_save{adapter}", "").replace(adapter, ""): name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if not (directory / _ADAPTER).is_file():
        raise CheckpointError(f"has no {_ADAPTER}; it is not a checkpoint of an adapter", file=directory)
    stored = load_file(directory / _ADAPTER)
    own = dict(model.named_parameters())
    state = {saved[name]: tensor.to(own[saved[name]].dtype) for name, tensor in stored.items() if name in saved}
    return state, sorted(stored.keys() - saved.keys())
