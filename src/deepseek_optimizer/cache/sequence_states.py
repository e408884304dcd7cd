"""The recurrent states of one sequence: which slot has the states after how many of its tokens. No torch, no bytes.

Unlike keys and values, a state cannot be cropped: to return to an earlier token, its states must have been stored. A step
stores the states after its last token, and, if requested, after earlier ones: after the last full block, from which another
sequence may continue (the prefix cache), or after every token, some of which may be rejected drafts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import StateMissingError
from .forgetting import BLOCK_TOKENS


def states_of_step(
    parts: Iterable[tuple[SequenceStates | None, int, int]],
) -> tuple[npt.NDArray[np.int32] | None, npt.NDArray[np.int32] | None]:
    """`StepBatch.state_from` and `StepBatch.state_to` of a step.

    Args:
        parts: for each sequence its states, the token of its first row, and its number of rows.

    Returns: int32 [S] and int32 [n, 2]; None, None if the sequences have no states.
    """
    sources, targets, row = [], [], 0
    for states, tokens, count in parts:
        if states is None:
            return None, None
        source, stored = states.step(tokens, count)
        sources.append(source)
        targets += [(row + place, slot) for place, slot in stored]
        row += count
    return np.array(sources, np.int32), np.array(targets, np.int32)


class Slots(Protocol):
    """What states need of the `BlockManager` of the slots."""

    @property
    def free_blocks(self) -> int: ...

    def allocate(self, count: int) -> list[int]: ...

    def retain(self, block: int) -> None: ...

    def release(self, block: int) -> None: ...

    def users(self, block: int) -> int: ...


class SequenceStates:
    """The slots of one sequence.

    Args:
        slots: manages all slots.
        interval: number of tokens, a multiple of a block's, after which states are stored for other sequences, in addition to
            those after the last full block; 0: only the latest states are stored.

    Attributes:
        stored: slot by number of tokens, ascending.
    """

    def __init__(self, slots: Slots, interval: int = 0) -> None:
        self.slots, self.interval = slots, interval
        self.stored: dict[int, int] = {}
        self._reused: dict[int, int] = {}  # as `stored`: what the next step reads and then overwrites

    def step(self, tokens: int, count: int) -> tuple[int, list[tuple[int, int]]]:
        """What a step reads and stores whose first row is token `tokens` and which has `count` rows, after `append`.

        Returns: the slot with the states after `tokens` tokens, -1 for none; and (row, slot) pairs.
        """
        source = -1 if tokens == 0 else (self._reused | self.stored)[tokens]
        self._reused = {}
        return source, [(at - tokens - 1, slot) for at, slot in self.stored.items() if tokens < at <= tokens + count]

    def latest(self, tokens: int) -> int:
        """The largest number of tokens, at most `tokens`, whose states are stored; 0 if there are none."""
        return max((at for at in self.stored if at <= tokens), default=0)

    def append(self, before: int, count: int, undo: int = 0) -> None:
        """Takes slots for the states that a step of `count` tokens stores. Slots of states that nobody needs any more are freed
        or reused; in the latter case the states before the step are lost with it.

        Args:
            before: tokens before the step.
            count: tokens of the step.
            undo: number of its last tokens that may be cropped afterwards: the states before each of them are stored.

        Raises:
            CacheFullError: too few free slots; the step's own were not changed.
        """
        after = before + count
        boundary = before - before % BLOCK_TOKENS if self.interval else 0
        reused = self.stored.get(before) if before != boundary and undo < count else None
        if reused is not None and self.slots.users(reused) > 1:
            reused = None
        required = list(range(max(before + 1, after - undo), after))
        if reused is None:
            required.append(after)
        for at in [at for at in self.stored if at not in (before, boundary)]:
            self.slots.release(self.stored.pop(at))
        new = dict(zip(required, self.slots.allocate(len(required)), strict=True))
        self._reused = {}
        for at in self._between(before, after):
            if at not in new and self.slots.free_blocks:
                new[at] = self.slots.allocate(1)[0]
        if reused is not None:
            self._reused = {before: self.stored.pop(before)}
            new[after] = reused
        self.stored.update(sorted(new.items()))

    def _between(self, before: int, after: int) -> list[int]:
        """Numbers of tokens between these, ascending, after which states are stored for other sequences."""
        if not self.interval:
            return []
        last = (after - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        regular = range((before // self.interval + 1) * self.interval, after, self.interval)
        return sorted({*regular, *([last] if last > before else [])})

    def crop(self, tokens: int) -> None:
        """Frees the slots of states after more than `tokens` tokens."""
        if tokens in self._reused:  # no step has overwritten it
            slot = self._reused.pop(tokens)
            self.stored = {tokens: slot} | {at: other for at, other in self.stored.items() if other != slot}
        for at in [at for at in self.stored if at > tokens]:
            self.slots.release(self.stored.pop(at))

    def check_crop(self, tokens: int) -> None:
        """Raises StateMissingError if the states after `tokens` tokens are not stored."""
        if tokens and tokens not in self.stored and tokens not in self._reused:
            raise StateMissingError(tokens, self.latest(tokens))

    def adopt(self, tokens: int, slot: int | None) -> None:
        """Continues from the states after `tokens` tokens in `slot`; earlier ones are released. The caller has counted the
        sequence among the users of the slot."""
        if slot is None:
            raise ValueError("a sequence with recurrent states cannot adopt blocks without them")
        self.crop(0)
        self.stored = {tokens: slot}

    def fork(self) -> SequenceStates:
        """States of a sequence with the same content; slots are shared."""
        twin = SequenceStates(self.slots, self.interval)
        twin.stored = dict(self.stored)
        for slot in twin.stored.values():
            self.slots.retain(slot)
        return twin
