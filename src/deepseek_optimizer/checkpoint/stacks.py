"""Stacks of experts' matrices in checkpoints: one tensor per matrix as DeepSeek publishes them, or merged as Transformers holds
them in memory.

| parameter | published | merged |
|---|---|---|
| `...experts.gate_up_proj` | `...experts.E.gate_proj.weight` and `...experts.E.up_proj.weight`, [I, H] each | [E, 2 I, H] |
| `...experts.down_proj` | `...experts.E.down_proj.weight`, [H, I] | [E, H, I] |

The stack of gate_up_proj has gate and up of each expert in turn, which is the order of the merged rows too. The merged
parameters of gpt-oss and Llama 4 have other orders, see `quant/transposed_stack.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..quant.transposed_stack import StackLayout

_STACK = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(?:gate|up|down)_proj\.weight")
_ROLES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_LAYOUTS: Mapping[str, StackLayout] = {"gpt_oss": "interleaved", "llama4_text": "columns"}  # families

StackShape = tuple[int, int, int]  # count, rows, cols


@dataclass(frozen=True)
class StackPart:
    """Where one matrix of a stack is stored: starting at row `row` of a tensor; all dimensions but the last count as rows."""

    tensor: str
    row: int = 0


def transposed_stacks(names: Collection[str], model_type: Any) -> dict[str, StackLayout]:
    """The layout of those of these parameters that are transposed stacks, by name."""
    layout: StackLayout = _LAYOUTS.get(model_type, "rows") if isinstance(model_type, str) else "rows"
    return {name: layout for name in names if is_stack(name)} if layout != "rows" else {}


def is_stack(name: str) -> bool:
    """Whether `name` is the parameter of a stack of experts' matrices."""
    return _STACK.fullmatch(name) is not None


def matrices_per_expert(name: str) -> int:
    """Number of matrices of one expert in the stack `name`: gate and up, or down."""
    return len(_ROLES[name.rpartition(".")[2]])


def parts(name: str, shape: StackShape, stored: Collection[str]) -> list[StackPart]:
    """The stack's matrices, in order, in a checkpoint that has the tensors `stored`."""
    count, rows, _ = shape
    if name in stored:
        return [StackPart(name, i * rows) for i in range(count)]
    match = _STACK.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not a stack of experts")
    experts, roles = match[1], _ROLES[match[2]]
    return [StackPart(f"{experts}.{i // len(roles)}.{roles[i % len(roles)]}.weight") for i in range(count)]


def merged_shape(name: str, shape: StackShape) -> StackShape:
    """The shape of the merged parameter of a stack."""
    count, rows, cols = shape
    each = matrices_per_expert(name)
    return count // each, each * rows, cols


def surplus_expert(tensor: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why a checkpoint's tensor of an expert is not used: its number is too large, or it is stored twice. None for other
    tensors.

    Args:
        tensor: name of the stored tensor.
        shapes: shapes that the model expects, by parameter name.
    """
    match = _EXPERT.fullmatch(tensor)
    shape = shapes.get(f"{match[1]}.down_proj") if match else None
    if match is None or shape is None:
        return None
    if int(match[2]) < shape[0]:
        return f"belongs to expert {int(match[2])}, whose weights are also stored under another name; remove one of the two"
    return f"belongs to expert {int(match[2])}, but the config has {shape[0]} experts (n_routed_experts), counted from 0"
