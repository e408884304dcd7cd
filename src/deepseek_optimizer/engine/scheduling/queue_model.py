"""What serving requests within some limits would have cost: a model of the engine's queue, in virtual time.

It knows when requests came, how many tokens of their prompts were processed and how many steps their answers took, and how
long steps take (`StepTimes`). Requests are admitted in order while the batch has room, every step decodes a token of each
answer, and what the limits leave goes to prompts, as in `Scheduler`; a prompt waits for blocks that another one is computing.
Not modelled: clients and priorities, a cache that is full, and what else the prefix cache would hold within other limits. Steps
that do the same are computed together, so that a request costs a few events. Does not import torch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import ceil

from ...cache.prefix_cache import Key
from .batch_size import BatchSize
from .budget import PromptBudget
from .policy import Served, StepLimits
from .step_times import StepTimes

_REFRESHED = 64  # calls of `run` after which step times are looked up again
_SMALL = 2  # rows of a small batch
_MOST = 1024  # requests that a model holds; more are answered at once


@dataclass
class _Modelled:
    """A request in a model: when it arrived, what it takes in all, and what is left of its prompt and of its answer's steps."""

    arrived: float
    request: Served
    prompt: int
    rounds: int


def work(times: StepTimes, prompt: int, answers: int) -> float:
    """What tokens are worth, in seconds that they would take in a small batch.

    Args:
        times: measured step times.
        prompt: number of prompt tokens.
        answers: number of decode steps of single requests.
    """
    return prompt * (times.prompt or 0.0) + answers * (times.decode(_SMALL) or 0.0) / _SMALL


class QueueModel:
    """The queue of an engine.

    Args:
        batch, budget: of the engine's options; `limit` says what is used of them.
        times: measured step times; `decode` and `prompt` must be known when the model runs.

    Attributes:
        now: the virtual time.
        busy: seconds of all steps so far.
        done: what they did, in seconds by `work`.
    """

    def __init__(self, batch: BatchSize, budget: PromptBudget, times: StepTimes) -> None:
        self.now = self.busy = self.done = 0.0
        self._batch, self._budget, self._times = batch, budget, times
        self._coming: deque[_Modelled] = deque()
        self._waiting: list[_Modelled] = []
        self._running: list[_Modelled] = []
        self._filling: set[Key] = set()  # blocks of prompts that are being computed
        self._ended = 0.0  # seconds of all requests that have ended
        self._runs, self._size = 0, 1
        self._rooms: dict[int, int] = {}
        self._plain: dict[int, float] = {}
        self._each = 0.0

    def add(self, arrived: float, request: Served) -> None:
        """Adds a request. Requests are added in the order of their arrival, and before the model runs past it."""
        if len(self._coming) + len(self._waiting) < _MOST:
            self._coming.append(_Modelled(arrived, request, request.prompt, request.rounds))

    def run(self, until: float, events: int) -> int:
        """Serves requests until a time; a step may end a little later.

        Args:
            until: the time.
            events: largest number of events to compute.

        Returns: number of events that are left; 0: it may not have come so far.
        """
        if self._runs % _REFRESHED == 0:
            self._size, self._each = self._batch.choose(), self._times.prompt or 0.0
            self._rooms.clear()
            self._plain.clear()
        self._runs += 1
        while self.now < until and events:
            if not self._running and not self._waiting:
                if not self._coming or self._coming[0].arrived >= until:
                    self.now = until
                    break
                self.now = max(self.now, self._coming[0].arrived)
            self._steps(until)
            events -= 1
        return events

    def limit(self, limits: StepLimits) -> None:
        """Changes the limits, from now on."""
        self._batch.limit(limits.batch)
        self._budget.limit(limits.step_tokens, limits.stall)
        self._runs = 0

    @property
    def waited(self) -> float:
        """Seconds that requests have been in the engine so far, in sum."""
        there = [*self._running, *self._waiting, *(r for r in self._coming if r.arrived < self.now)]
        return self._ended + sum(self.now - r.arrived for r in there)

    def _steps(self, until: float) -> None:
        """Computes steps up to the next one that does something else."""
        self._admit()
        decoding = [r for r in self._running if r.prompt <= 0]
        rows = round(sum(r.request.rows for r in decoding))
        chunks = self._chunks(rows)
        seconds = self._seconds(rows, sum(count for _, count in chunks))
        if len(self._running) < self._size and self._coming:
            until = min(until, self._coming[0].arrived)
        count = max(1, ceil((until - self.now) / seconds)) if seconds else 1
        count = min([count, *(r.rounds for r in decoding), *(max(1, r.prompt // tokens) for r, tokens in chunks)])
        self.now += count * seconds
        self.busy += count * seconds
        self.done += count * work(self._times, sum(tokens for _, tokens in chunks), len(decoding))
        for r in decoding:
            r.rounds -= count
        for r, tokens in chunks:
            r.prompt -= count * tokens
            if r.prompt <= 0:
                self._filling.difference_update(r.request.keys)
        ended = [r for r in self._running if r.prompt <= 0 and r.rounds <= 0]
        if ended:
            self._ended += sum(self.now - r.arrived for r in ended)
            self._running = [r for r in self._running if r.prompt > 0 or r.rounds > 0]

    def _admit(self) -> None:
        while self._coming and self._coming[0].arrived <= self.now:
            self._waiting.append(self._coming.popleft())
        place = 0
        while place < len(self._waiting) and len(self._running) < self._size:
            if self._waiting[place].request.prefix in self._filling:
                place += 1
                continue
            self._running.append(self._waiting.pop(place))
            self._filling.update(self._running[-1].request.keys)

    def _chunks(self, rows: int) -> list[tuple[_Modelled, int]]:
        """Returns the prompt tokens of a step: half of the room is the shortest prompt's, the rest in order."""
        filling = [r for r in self._running if r.prompt > 0]
        if not filling:
            return []
        if rows not in self._rooms:
            self._rooms[rows] = self._budget.tokens(rows)
        room, found = self._rooms[rows], []
        shortest = min(filling, key=lambda r: r.prompt)
        if shortest is not filling[0] and (half := min(shortest.prompt, room // 2)):
            found.append((shortest, half))
            room -= half
            filling.remove(shortest)
        for r in filling:
            if room <= 0:
                break
            found.append((r, min(r.prompt, room)))
            room -= found[-1][1]
        return found

    def _seconds(self, rows: int, tokens: int) -> float:
        if rows not in self._plain:
            self._plain[rows] = (self._times.decode(rows) if rows else (self._times.line() or (0.0, 0.0))[0]) or 0.0
        return self._plain[rows] + tokens * self._each
