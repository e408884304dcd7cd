"""Recurrent layers in GGUF files: the order of rows and columns that llama.cpp's converter gives to delta nets' tensors.

In Transformers, the value heads of a gated delta net are grouped by the key head that they share: value head `k * r + i` is the
i-th of key head k, of r. Qwen3.5's files have them in the order `i * keys + k`. Qwen3-Next's files have the joint projection of
queries, keys, values and gates as two tensors, each with all heads of one kind together.

Sources: llama.cpp's conversion/qwen.py (Qwen3NextModel, _LinearAttentionVReorderBase) and conversion/kimi_linear.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError
from ..quant.packed import ColumnOrder
from .gguf_parameters import Order, Parameter

_MAX_WIDTH = 1 << 20


@dataclass(frozen=True)
class _Heads:
    """Sizes of a gated delta net."""

    keys: int
    key_dim: int
    values: int
    value_dim: int

    def grouped(self, size: int) -> Order:
        """The stored number of each row, of `size` rows a value head."""
        each = self.values // self.keys
        heads = np.arange(self.values).reshape(each, self.keys).T.reshape(-1)
        return _rows(heads, size)


def _heads(config: Mapping[str, Any], path: Path) -> _Heads:
    names = ("num_key_heads", "key_head_dim", "num_value_heads", "value_head_dim")
    heads = _Heads(*(config[f"linear_{name}"] for name in names))
    if heads.values % heads.keys or max(heads.keys * heads.key_dim, heads.values * heads.value_dim) > _MAX_WIDTH:
        raise CheckpointError(
            f"ssm.time_step_rank, {heads.values}, must be a multiple of ssm.group_count, {heads.keys}, and all heads together "
            f"have at most {_MAX_WIDTH} elements",
            file=path,
        )
    return heads


def _rows(heads: Order, size: int, first: int = 0) -> Order:
    """Numbers of the rows of some heads, of `size` rows each, which start at row `first`."""
    return (first + heads[:, None] * size + np.arange(size)).reshape(-1)


def group_value_heads(parameters: dict[str, Parameter], config: Mapping[str, Any], path: Path) -> None:
    """Qwen3.5: brings value heads into Transformers' order."""
    _shape_vectors(parameters, path)
    heads = _heads(config, path)
    if heads.keys == heads.values:
        return
    values = heads.grouped(heads.value_dim)
    mixed = np.concatenate([np.arange(2 * heads.keys * heads.key_dim), 2 * heads.keys * heads.key_dim + values])
    orders = {
        "in_proj_qkv.weight": mixed, "conv1d.weight": mixed, "in_proj_z.weight": values,
        "in_proj_a.weight": heads.grouped(1), "in_proj_b.weight": heads.grouped(1), "A_log": heads.grouped(1),
        "dt_bias": heads.grouped(1),
    }  # fmt: skip
    for name, parameter in _delta_nets(parameters):
        leaf = name.partition(".linear_attn.")[2]
        if leaf in orders:
            parameters[name] = replace(parameter, order=orders[leaf])
        elif leaf == "out_proj.weight":
            if parameter.shape[-1] != len(values):
                raise CheckpointError(
                    f"has {parameter.shape[-1]} columns, but the metadata require {len(values)}; convert the model again",
                    file=path,
                    tensor=name,
                )
            parameters[name] = replace(parameter, columns=ColumnOrder(heads.keys, heads.values // heads.keys))


def join_projections(parameters: dict[str, Parameter], config: Mapping[str, Any], path: Path) -> None:
    """Qwen3-Next: joins the projections of queries, keys and values, and of gates, for each key head in turn."""
    _shape_vectors(parameters, path)
    heads = _heads(config, path)
    keys, each = heads.keys * heads.key_dim, heads.values // heads.keys * heads.value_dim
    order = np.concatenate([
        np.concatenate([
            _rows(np.array([k]), heads.key_dim), _rows(np.array([k]), heads.key_dim, keys),
            _rows(np.array([k]), each, 2 * keys), _rows(np.array([k]), each, 2 * keys + heads.keys * each),
        ])
        for k in range(heads.keys)
    ])  # fmt: skip
    for name in [name for name in parameters if name.endswith(".linear_attn.in_proj_qkv.weight")]:
        other = name.replace("in_proj_qkv", "in_proj_z")
        if other not in parameters:
            raise CheckpointError(f"is present without {other}", file=path, tensor=name)
        sources = parameters.pop(name).sources + parameters.pop(other).sources
        shape = (len(order), sources[0].shape[-1])
        parameters[name.replace("in_proj_qkv", "in_proj_qkvz")] = Parameter(sources, shape, order)


def join_convolutions(parameters: dict[str, Parameter], config: Mapping[str, Any], path: Path) -> None:
    """Kimi Linear: joins the convolutions of queries, keys and values."""
    heads = config["linear_num_heads"]
    for name in [name for name in parameters if name.endswith(".q_conv1d.weight")]:
        parts = [name.replace(".q_conv1d.", f".{part}_conv1d.") for part in "qkv"]
        if missing := [part for part in parts if part not in parameters]:
            raise CheckpointError(f"is present without {missing[0]}", file=path, tensor=name)
        sources = tuple(source for part in parts for source in parameters.pop(part).sources)
        kernel = sources[0].shape[-1]
        rows = sum(math.prod(source.shape[:-1]) for source in sources)
        parameters[name.replace("q_conv1d", "conv1d")] = Parameter(sources, (rows, 1, kernel))
    for name, parameter in list(parameters.items()):
        if name.endswith(".A_log"):
            parameters[name] = _decay_rate(replace(parameter, shape=(1, 1, heads, 1)), path)


def convolution_channels(parameters: dict[str, Parameter], config: Mapping[str, Any], path: Path) -> None:
    """LFM2: a convolution's weights have a dimension more in Transformers."""
    for name, parameter in list(parameters.items()):
        if name.endswith(".conv.conv.weight"):
            parameters[name] = _channels(parameter)


def _delta_nets(parameters: Mapping[str, Parameter]) -> list[tuple[str, Parameter]]:
    return [(name, parameter) for name, parameter in parameters.items() if ".linear_attn." in name]


def _shape_vectors(parameters: dict[str, Parameter], path: Path) -> None:
    """Rates of decay as logarithms, and convolutions with a dimension more."""
    for name, parameter in _delta_nets(parameters):
        if name.endswith(".A_log"):
            parameters[name] = _decay_rate(replace(parameter, shape=(parameter.stored_rows,)), path)
        elif name.endswith(".conv1d.weight"):
            parameters[name] = _channels(parameter)


def _channels(parameter: Parameter) -> Parameter:
    return replace(parameter, shape=(parameter.stored_rows, 1, parameter.shape[-1]))


def _decay_rate(parameter: Parameter, path: Path) -> Parameter:
    """The logarithm A_log; the file has -exp(A_log)."""

    def convert(values: torch.Tensor) -> torch.Tensor:
        if not bool((values < 0).all()):
            raise CheckpointError(
                "must have rates of decay below 0; convert the model again", file=path, tensor=parameter.sources[0].name
            )
        return (-values.float()).log()

    return replace(parameter, convert=convert)
