"""Optimizer state of sharded parameters (FSDP2). Checkpoints contain full tensors, so that training can be resumed with any
number of processes; loading shards them again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..optimizer import DeepSeekAdamW
from ..shards import is_sharded
from .sharded_moments import NAMES, ROOT, gathered_moments, is_coded, scattered_moments

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # torch built without distributed: nothing is sharded
    DTensor = None  # type: ignore[assignment,misc]


def gathered(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Gathers the full tensors of sharded parameters in an optimizer's state_dict; 8-bit moments as in `sharded_moments`. Must
    be called by all processes.

    Args:
        groups: the optimizer's param_groups, whose parameters correspond to the indices in the state_dict.
    """

    def change(state: dict[str, Any], parameter: Any) -> dict[str, Any]:
        coded = gathered_moments(state, parameter, functools.partial(_whole, parameter=parameter)) if is_coded(state) else {}
        others = {name: value for name, value in state.items() if not coded or name not in NAMES}
        return {**_each_tensor(others, functools.partial(_whole, parameter=parameter)), **coded}

    return _each(state_dict, groups, change)


def scattered(state_dict: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """The inverse of `gathered`: shards every tensor of a sharded parameter's shape like the parameter. Parameters may be
    sharded among another number of processes, or not at all.

    Args:
        optimizer: `DeepSeekAdamW` gets local tensors of its shards, other optimizers get DTensors.
    """
    plain = isinstance(getattr(optimizer, "optimizer", optimizer), DeepSeekAdamW)

    def change(state: dict[str, Any], parameter: Any) -> dict[str, Any]:
        sharded = is_sharded(parameter)
        coded = scattered_moments(state, parameter if sharded else None) if is_coded(state) else {}
        others = {name: value for name, value in state.items() if not coded or name not in (*NAMES, ROOT)}
        if sharded:
            others = _each_tensor(others, functools.partial(_sharded, parameter=parameter, plain=plain))
        return {**others, **coded}

    return _each(state_dict, optimizer.param_groups, change, sharded_only=False)


def whole(tensor: Any) -> torch.Tensor:
    """The full tensor of a sharded or plain tensor. Must be called by all processes.

    On CPUs, torch's full state_dict leaves tensors sharded, and gathered tensors are asynchronous and must be awaited.
    """
    full = tensor.full_tensor() if is_sharded(tensor) else tensor
    full = full.wait() if hasattr(full, "wait") else full
    return full


def _each(
    state_dict: dict[str, Any],
    groups: list[dict[str, Any]],
    change: Callable[[dict[str, Any], Any], dict[str, Any]],
    sharded_only: bool = True,
) -> dict[str, Any]:
    """A state_dict with the states of parameters changed."""
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    states = dict(state_dict["state"])
    for index, parameter in zip(indices, parameters, strict=True):
        if index in states and (is_sharded(parameter) or not sharded_only):
            states[index] = change(states[index], parameter)
    return {**state_dict, "state": states}


def _each_tensor(state: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    return {name: change(v) if isinstance(v, torch.Tensor) and v.dim() else v for name, v in state.items()}


def _whole(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    if is_sharded(value):
        return whole(value)
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


def _sharded(value: torch.Tensor, parameter: Any, plain: bool) -> torch.Tensor:
    if value.shape != parameter.shape:
        return value
    value = value.to(parameter.to_local().device)
    sharded = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return sharded.to_local() if plain else sharded
