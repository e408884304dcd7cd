"""What stays in a pruned model, and how many of what that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import ConfigError

Kept = Mapping[int, tuple[int, ...]]  # layer of the original model -> kept units in it, ascending


@dataclass(frozen=True)
class Selection:
    """What stays of a model.

    Attributes:
        layers: numbers of the layers that stay, ascending.
        kept: by kind (`families.MLP` and so on), the units that stay in each of these layers; kinds that are not cut are
            left out, and so are layers without such units (dense layers of a model with experts).
    """

    layers: tuple[int, ...]
    kept: Mapping[str, Kept] = field(default_factory=dict)


def remaining(what: str, fraction: float, count: int, multiple: int = 1) -> int:
    """How many of `count` stay if `fraction` of them is left out, as a multiple of `multiple`: the nearest, at least one.

    Args:
        what: name of the setting, for errors.

    Raises:
        ConfigError: the fraction is not between 0 and 1, or is so small that everything would stay.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"{what}: must be a fraction above 0 and below 1, such as 0.25; got {fraction}")
    left = max(round((1 - fraction) * count / multiple), 1) * multiple
    if left >= count:
        step = f"in steps of {multiple}" if multiple > 1 else "one by one"
        raise ConfigError(
            f"{what}: {fraction} of {count} leaves out none, since they are left out {step}; use a larger fraction"
        )
    return left


def most_important(scores: Sequence[float] | torch.Tensor, count: int, groups: int = 1) -> tuple[int, ...]:
    """The positions of the `count` highest scores, ascending; of equal ones the first.

    Args:
        scores: one for each unit.
        count: how many stay; a multiple of `groups`.
        groups: number of equal parts, each of which keeps the same number.
    """
    values = torch.as_tensor(scores, dtype=torch.float64, device="cpu").reshape(groups, -1)
    best = values.argsort(dim=1, descending=True, stable=True)[:, : count // groups]
    first = torch.arange(groups, dtype=torch.int64, device="cpu")[:, None] * values.shape[1]
    return tuple(sorted((best + first).flatten().tolist()))
