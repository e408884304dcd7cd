"""Stacks of experts' matrices, as checkpoints hold them: tensor by tensor as DeepSeek publishes them, or merged as Transformers
has them in memory.

| parameter | published | merged |
|---|---|---|
| `...experts.gate_up_proj` | `...experts.E.gate_proj.weight` and `...experts.E.up_proj.weight`, [I, H] each | [E, 2 I, H] |
| `...experts.down_proj` | `...experts.E.down_proj.weight`, [H, I] | [E, H, I] |

The stack of gate_up_proj has gate and up of each expert in turn, which is the order of the merged rows too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

_STACK = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(?:gate|up|down)_proj\.weight")
_ROLES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

StackShape = tuple[int, int, int]  # count, rows, cols


@dataclass(frozen=True)
class StackPart:
    """Where one matrix of a stack is stored: from row `row` of a tensor on, whose dimensions but the last all count as rows."""

    tensor: str
    row: int = 0


def is_stack(name: str) -> bool:
    """Whether this is the parameter's name of a stack of experts' matrices."""
    return _STACK.fullmatch(name) is not None


def matrices_per_expert(name: str) -> int:
    """How many matrices of the stack `name` belong to one expert: gate and up, or down."""
    return len(_ROLES[name.rpartition(".")[2]])


def parts(name: str, shape: StackShape, stored: Collection[str]) -> list[StackPart]:
    """The stack's matrices, in order, in a checkpoint that has the tensors `stored`."""
    count, rows, _ = shape
    if name in stored:
        return [StackPart(name, i * rows) for i in range(count)]
    found = _STACK.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is no stack of experts")
    experts, roles = found[1], _ROLES[found[2]]
    return [StackPart(f"{experts}.{i // len(roles)}.{roles[i % len(roles)]}.weight") for i in range(count)]


def merged_shape(name: str, shape: StackShape) -> StackShape:
    """The shape of the merged parameter of a stack."""
    count, rows, cols = shape
    each = matrices_per_expert(name)
    return count // each, each * rows, cols


def surplus_expert(tensor: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What is wrong with an expert's tensor that nothing wants: its number, or that there is another in its place. None for
    other tensors.

    Args:
        shapes: of what is wanted, by parameter name.
    """
    found = _EXPERT.fullmatch(tensor)
    shape = shapes.get(f"{found[1]}.down_proj") if found else None
    if found is None or shape is None:
        return None
    if int(found[2]) < shape[0]:
        return f"is of expert {int(found[2])}, whose weights are there under another name too; take one of the two out"
    return f"is of expert {int(found[2])}, but the config has {shape[0]} experts (n_routed_experts), counted from 0"
