"""What the processes of ranks 1 and higher do: they run what the leader says, until it says `END` or is gone."""

from __future__ import annotations

import pickle
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from ...errors import CheckpointChangedError, RankLostError
from ..base import StepBatch
from .backend import RankBackend
from .commands import Commands, OwnPart
from .messages import DONE, END, FAILED, LOST, answer

_ANSWERED = ("new_store", "ask_store", "fingerprint", "compile")  # the messages that the leader expects answers to


def serve(backend: RankBackend, part: OwnPart, answers: Connection) -> bool:
    """Runs the leader's messages. Returns when there will be no more of them.

    Args:
        backend: this process's, with its plans.
        part: what it has of the model.
        answers: the pipe to the leader. A message that fails is answered with the reason, and ends the group.

    Returns:
        Whether the leader has said so; False: a process is gone, or the files of the model have changed.
    """
    commands = _Commands(backend, part)
    try:
        with backend.thread_context():
            while True:
                name, *arguments = pickle.loads(backend.group.receive())  # noqa: S301  # from the leader, see `Group`
                if name == END:
                    return True
                result = getattr(commands, name)(*arguments)
                if name in _ANSWERED:
                    answer(answers, DONE, result)
    except RankLostError:
        _say(answers, LOST, backend.group.lost or 0)
    except BaseException as error:
        _say(answers, FAILED, f"{type(error).__name__}: {error}")
        backend.group.lose(backend.group.rank)
        if not isinstance(error, CheckpointChangedError):  # a user's doing, which needs no traceback
            raise
    return False


def _say(answers: Connection, kind: str, value: Any) -> None:
    try:
        answer(answers, kind, value)
    except OSError:  # the leader is gone
        pass


class _Commands(Commands[RankBackend]):
    """Those of a rank."""

    def __init__(self, backend: RankBackend, part: OwnPart) -> None:
        super().__init__(backend, part)
        self._logits: torch.Tensor | None = None

    def new_store(self, number: int, kv_dtype: str, num_blocks: int) -> None:
        self._stores[number] = self._backend.new_store(self._part.graph, kv_dtype, num_blocks)

    def store(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        getattr(self._stores[number], method)(*arguments)

    def ask_store(self, number: int, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self._stores[number], method)(*arguments)

    def write_block(self, number: int, block: int, parts: list[bytes]) -> None:
        self._stores[number].write_block(block, parts[self._backend.group.rank])

    def run(self, plan: int, number: int, batch: StepBatch) -> None:
        own = self._backend.plans[plan]
        own.run(self._with_logits(batch, own.vocab_size), self._stores[number])

    def decode(self, plan: int, number: int, batch: StepBatch, call: Any) -> None:
        rows, own = len(batch.logit_rows) * (call.steps if call.keep_logits else 1), self._backend.plans[plan]
        own.decode(self._with_logits(batch, own.vocab_size, rows), self._stores[number], call)

    def _with_logits(self, batch: StepBatch, width: int, rows: int | None = None) -> StepBatch:
        """The batch with memory for its logits, which steps share: new memory would cost page faults at every step."""
        needed = len(batch.logit_rows) if rows is None else rows
        if needed == 0:
            return batch
        elements = needed * width
        if self._logits is None or len(self._logits) < elements:
            self._logits = torch.empty(elements, dtype=torch.float32, device="cpu")
        return replace(batch, logits=self._logits[:elements].view(needed, width))
