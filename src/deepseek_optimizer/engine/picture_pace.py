"""Pictures are encoded in pieces, between which the engine makes a step while sequences are running. Does not import torch."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .core import EngineCore

_PATIENCE = 1.0  # seconds to wait for a step, as the engine may itself wait for something
_SHORTEST = 0.005  # seconds of a piece: shorter ones take longer in total


class PicturePace:
    """Takes turns: between two pieces, the engine has made a step unless nothing was running.

    One thread encodes at a time. A piece may take as long as the prompt tokens that the engine would add to a step
    (`PromptBudget.spare`).
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._steps = self._seen = 0
        self._busy = False
        self._seconds = math.inf

    def next_piece(self) -> float:
        """Waits for a step of the engine if sequences are running. Returns how many seconds the next piece may take."""
        with self._turn:
            self._turn.wait_for(lambda: not self._busy or self._steps > self._seen, _PATIENCE)
            self._seen = self._steps
            return self._seconds if self._busy else math.inf

    def stepped(self, core: EngineCore) -> None:
        """Call after each step, on the engine's thread."""
        running = core.scheduler.running
        spare = core.scheduler.budget.spare(sum(r.decoding for r in running))
        with self._turn:
            self._steps += 1
            self._busy = bool(running)
            self._seconds = math.inf if spare is None else max(_SHORTEST, spare)
            self._turn.notify_all()

    def stopped(self) -> None:
        """Call when the engine makes no more steps."""
        with self._turn:
            self._busy = False
            self._turn.notify_all()
