"""Optimizer state of sharded parameters (FSDP2). Checkpoints contain full tensors, so that training can be resumed with any
number of processes; loading shards them again."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...errors import ConfigError
from ..optimizer import DeepSeekAdamW

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # torch built without distributed: nothing is sharded
    DTensor = None  # type: ignore[assignment,misc]


def gathered(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Gathers the full tensors of sharded parameters in an optimizer's state_dict. Must be called by all processes.

    Args:
        groups: the optimizer's param_groups, whose parameters correspond to the indices in the state_dict.

    Raises:
        ConfigError: a state cannot be gathered (8-bit moments, whose scales cover blocks of one shard).
    """
    return _each(state_dict, groups, _whole)


def scattered(state_dict: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """The inverse of `gathered`: shards every tensor of a sharded parameter's shape like the parameter.

    Args:
        optimizer: `DeepSeekAdamW` gets local tensors of its shards, other optimizers get DTensors.
    """
    plain = isinstance(getattr(optimizer, "optimizer", optimizer), DeepSeekAdamW)
    return _each(state_dict, optimizer.param_groups, functools.partial(_sharded, plain=plain))


def whole(tensor: Any) -> torch.Tensor:
    """The full tensor of a sharded or plain tensor. Must be called by all processes.

    On CPUs, torch's full state_dict leaves tensors sharded, and gathered tensors are asynchronous and must be awaited.
    """
    full = tensor.full_tensor() if DTensor is not None and isinstance(tensor, DTensor) else tensor
    full = full.wait() if hasattr(full, "wait") else full
    return full


def _each(state_dict: dict[str, Any], groups: list[dict[str, Any]], change: Any) -> dict[str, Any]:
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    states = dict(state_dict["state"])
    for index, parameter in zip(indices, parameters, strict=True):
        if DTensor is not None and isinstance(parameter, DTensor) and index in states:
            states[index] = {
                name: change(value, parameter, name) if isinstance(value, torch.Tensor) and value.dim() else value
                for name, value in states[index].items()
            }
    return {**state_dict, "state": states}


def _whole(value: torch.Tensor, parameter: Any, name: str) -> torch.Tensor:
    if not isinstance(value, DTensor):
        if value.shape != parameter.to_local().shape:
            raise ConfigError(
                f'optimizer_state="int8" stores {name} in blocks of one shard, which cannot be gathered; with fsdp, use '
                'optimizer_state="bf16" or "fp32"'
            )
        # gloo does not support int16, so transfer it as another two-byte dtype
        transferable = value.view(torch.float16) if value.dtype == torch.int16 else value
        sharded = DTensor.from_local(
            transferable,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return whole(sharded).view(value.dtype)
    return whole(value)


def _sharded(value: torch.Tensor, parameter: Any, name: str, plain: bool) -> torch.Tensor:
    if value.shape != parameter.shape:
        return value
    value = value.to(parameter.to_local().device)
    sharded = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return sharded.to_local() if plain else sharded
