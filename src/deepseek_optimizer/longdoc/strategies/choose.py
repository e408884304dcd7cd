"""Which strategy answers: by the document's length, what the model can take, the task and the question."""

from __future__ import annotations

from collections.abc import Callable

from ..material import Material
from ..tasks import Task
from ..work import Work

Strategy = Callable[[Task, Material, str], Work]  # (task, material, reason)
STRATEGIES = ("whole", "window", "map_reduce", "retrieve")


def choose(task: Task, material: Material) -> tuple[str, str]:
    """The strategy's name, and why it is the one."""
    raise NotImplementedError


def answer_by(task: Task, material: Material, strategy: str = "auto") -> Work:
    """The work of answering.

    Args:
        strategy: one of STRATEGIES, or "auto": `choose` says which.

    Raises:
        ConfigError: there is no such strategy.
        RequestError: the one that was asked for cannot do this task on this document; the message names the remedy.
    """
    raise NotImplementedError
