"""What ranks 1 and higher of a pipeline do: they run what the first process says, until it says `END` or is gone."""

from __future__ import annotations

import pickle
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from ...errors import CheckpointChangedError, RankLostError
from ..base import StepBatch
from .commands import Commands, OwnPart
from .messages import DONE, END, END_BYTES, FAILED, answer
from .stages import StageBackend

_UNANSWERED = ("drop_store", "decode")


def serve_stage(backend: StageBackend, part: OwnPart, link: Connection) -> bool:
    """Runs the messages of the first process. Returns when there will be no more of them.

    Args:
        backend: this process's, with its plans.
        part: what it has of the model.
        link: to the first process. A message that fails is answered with the reason, and ends the group.

    Returns:
        Whether the first process has said so; False: it is gone, or the files of the model have changed.
    """
    commands = _Commands(backend, part, link)
    try:
        with backend.thread_context():
            while True:
                try:
                    name, arguments = next_message(link)
                except (EOFError, OSError):
                    return False
                if name == END:
                    return True
                result = getattr(commands, name)(*arguments)
                if name not in _UNANSWERED:
                    answer(link, DONE, result)
    except BaseException as error:
        try:
            answer(link, FAILED, f"{type(error).__name__}: {error}")
        except OSError:
            return False
        if not isinstance(error, CheckpointChangedError):  # a user's doing, which needs no traceback
            raise
        return False


def next_message(link: Connection) -> tuple[str, list[Any]]:
    """The name and the arguments of the next message, of a step with its hidden rows. Steps that are not run are left out; if
    the group ends before the rows come, `END`."""
    while True:
        name, *arguments = pickle.loads(link.recv_bytes())  # noqa: S301  # from the first process of the group
        if name != "run":
            return name, arguments
        plan, number, batch = arguments
        rows = link.recv_bytes()
        if not rows:
            continue
        if rows == END_BYTES:
            return END, []
        states = torch.frombuffer(bytearray(rows), dtype=torch.float32).view(len(batch.positions), -1)
        return name, [plan, number, replace(batch, states=states)]


class _Commands(Commands[StageBackend]):
    """Those of a stage."""

    def __init__(self, backend: StageBackend, part: OwnPart, link: Connection) -> None:
        super().__init__(backend, part)
        self._link = link

    def new_store(self, number: int, kv_dtype: str, num_blocks: int) -> int:
        store = self._stores[number] = self._backend.new_store(self._part.graph, kv_dtype, num_blocks)
        return int(store.saved_bytes)

    def store(self, number: int, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self._stores[number], method)(*arguments)

    def run(self, plan: int, number: int, batch: StepBatch) -> torch.Tensor:
        rows = self._backend.plans[plan].run(batch, self._stores[number]).last_hidden
        assert rows is not None
        return rows

    def decode(self, plan: int, number: int, batch: StepBatch) -> None:
        # What has come instead of rows is the next message; without a first process there is none.
        with suppress(RankLostError):
            self._backend.plans[plan].follow(batch, self._stores[number], self._link.fileno())
