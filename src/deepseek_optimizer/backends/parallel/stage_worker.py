"""What ranks 1 and higher of a pipeline do: they run what the first process says, until it says `END` or is gone."""

from __future__ import annotations

import pickle
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from ...errors import CheckpointChangedError
from ...graph.ir import Graph
from ..base import StepBatch
from .messages import DONE, END, FAILED, UNANSWERED, answer
from .stages import StageBackend


def serve_stage(backend: StageBackend, graph: Graph, link: Connection) -> bool:
    """Runs the messages of the first process. Returns when there will be no more of them.

    Args:
        backend: this process's, with its plan.
        graph: of the whole model.
        link: to the first process. A message that fails is answered with the reason, and ends the group.

    Returns:
        Whether the first process has said so; False: it is gone, or the files of the model have changed.
    """
    commands = _Commands(backend, graph, link)
    try:
        with backend.thread_context():
            while True:
                try:
                    name, *arguments = pickle.loads(link.recv_bytes())  # noqa: S301  # from the first process of the group
                except (EOFError, OSError):
                    return False
                if name == END:
                    return True
                result = getattr(commands, name)(*arguments)
                if result is not UNANSWERED:
                    answer(link, DONE, result)
    except BaseException as error:
        try:
            answer(link, FAILED, f"{type(error).__name__}: {error}")
        except OSError:
            return False
        if not isinstance(error, CheckpointChangedError):  # a user's doing, which needs no traceback
            raise
        return False


class _Commands:
    """One method per message."""

    def __init__(self, backend: StageBackend, graph: Graph, link: Connection) -> None:
        self._backend, self._graph, self._link = backend, graph, link
        self._stores: dict[int, Any] = {}

    def new_store(self, number: int, kv_dtype: str, num_blocks: int) -> int:
        store = self._stores[number] = self._backend.new_store(self._graph, kv_dtype, num_blocks)
        return int(store.saved_bytes)

    def drop_store(self, number: int) -> object:
        self._stores.pop(number, None)
        return UNANSWERED

    def store(self, number: int, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self._stores[number], method)(*arguments)

    def run(self, number: int, batch: StepBatch) -> object:
        """Runs a step, whose hidden rows follow as bytes, none if the step is not run."""
        plan = self._backend.plan
        assert plan is not None
        rows = torch.empty((len(batch.positions), plan.hidden_size), dtype=torch.float32, device="cpu")
        if self._link.recv_bytes_into(rows.numpy().data.cast("B")) == 0:
            return UNANSWERED
        return plan.run(replace(batch, states=rows), self._stores[number]).last_hidden
