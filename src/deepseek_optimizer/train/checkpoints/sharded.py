"""Optimizer state of parameters that several processes share (FSDP2): whole in a checkpoint, so that any number of processes
can go on from it, and in shards again afterwards."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...errors import ConfigError
from ..optimizer import DeepSeekAdamW

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # a torch without distributed: nothing is shared
    DTensor = None  # type: ignore[assignment,misc]


def gathered(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """An optimizer's state_dict with every tensor of a shared parameter whole. All processes call it, and all get it.

    Args:
        groups: the optimizer's groups, whose parameters are numbered through.

    Raises:
        ConfigError: a state that belongs to the shard alone (8-bit moments, whose scales are of blocks of a shard).
    """
    return _each(state_dict, groups, _whole)


def scattered(state_dict: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """The way back: every tensor of a shared parameter's shape is shared as the parameter is.

    Args:
        optimizer: DeepSeekAdamW has plain tensors of its shards; others have what is shared.
    """
    plain = isinstance(getattr(optimizer, "optimizer", optimizer), DeepSeekAdamW)
    return _each(state_dict, optimizer.param_groups, functools.partial(_shared, plain=plain))


def whole(tensor: Any) -> torch.Tensor:
    """All of a tensor, shared or not. All processes call it.

    On CPUs torch's own way to a full state_dict leaves tensors in shards, and what it gathers is a promise without memory.
    """
    found = tensor.full_tensor() if DTensor is not None and isinstance(tensor, DTensor) else tensor
    found = found.wait() if hasattr(found, "wait") else found
    return found


def _each(state_dict: dict[str, Any], groups: list[dict[str, Any]], change: Any) -> dict[str, Any]:
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    states = dict(state_dict["state"])
    for number, parameter in zip(numbers, parameters, strict=True):
        if DTensor is not None and isinstance(parameter, DTensor) and number in states:
            states[number] = {
                name: change(value, parameter, name) if isinstance(value, torch.Tensor) and value.dim() else value
                for name, value in states[number].items()
            }
    return {**state_dict, "state": states}


def _whole(value: torch.Tensor, parameter: Any, name: str) -> torch.Tensor:
    if not isinstance(value, DTensor):
        if value.shape != parameter.to_local().shape:
            raise ConfigError(
                f'optimizer_state="int8" keeps {name} by blocks of each process\'s shard, which cannot be gathered: with fsdp '
                'take optimizer_state="bf16" or "fp32"'
            )
        # gloo knows no int16; any format of two bytes is as good for being moved
        moved = value.view(torch.float16) if value.dtype == torch.int16 else value
        shared = DTensor.from_local(
            moved,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return whole(shared).view(value.dtype)
    return whole(value)


def _shared(value: torch.Tensor, parameter: Any, name: str, plain: bool) -> torch.Tensor:
    if value.shape != parameter.shape:
        return value
    value = value.to(parameter.to_local().device)
    shared = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return shared.to_local() if plain else shared
