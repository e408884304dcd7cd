"""The recurrent states of one sequence: which slot has the states after how many of its tokens. No torch, no bytes.

Unlike keys and values, a state cannot be cropped: to return to an earlier token, its states must have been stored. A step
stores the states after its last token, and, if requested, after earlier ones: after the last full block, from which another
sequence may continue (the prefix cache), or after every token, some of which may be rejected drafts.
"""

from __future__ import annotations

from typing import Protocol

from ..errors import StateMissingError
from .forgetting import BLOCK_TOKENS


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

    def source(self, tokens: int) -> int:
        """The slot from which a step reads the states after `tokens` tokens; -1 for none."""
        return -1 if tokens == 0 else (self._reused | self.stored)[tokens]

    def targets(self, tokens: int, count: int) -> list[tuple[int, int]]:
        """(row, slot): where a step stores states, if its first row is token `tokens` and it has `count` rows."""
        return [(at - tokens - 1, slot) for at, slot in self.stored.items() if tokens < at <= tokens + count]

    def latest(self, tokens: int) -> int:
        """The largest number of tokens, at most `tokens`, whose states are stored; 0 if there are none."""
        return max((at for at in self.stored if at <= tokens), default=0)

    def append(self, before: int, count: int, each: bool = False) -> None:
        """Takes slots for the states that a step of `count` tokens stores. Slots of states that nobody needs any more are freed
        or reused; in the latter case the states before the step are lost with it.

        Args:
            before: tokens before the step.
            count: tokens of the step.
            each: whether to store the states after every token.

        Raises:
            CacheFullError: too few free slots; nothing was changed.
        """
        after = before + count
        boundary = before - before % BLOCK_TOKENS if self.interval else 0
        unneeded = [at for at in self.stored if at not in (before, boundary)]
        places = range(before + 1, after) if each else self._between(before, after)
        reused = self.stored.get(before) if before != boundary and not each else None
        if reused is not None and self.slots.users(reused) > 1:
            reused = None
        required = len(places) if each else 0
        new = self.slots.allocate(required + (reused is None))
        for at in unneeded:
            self.slots.release(self.stored.pop(at))
        self._reused = {}
        if each:
            self.stored.update(zip(places, new, strict=False))
        else:
            for at in places:
                if self.slots.free_blocks:
                    self.stored[at] = self.slots.allocate(1)[0]
        if reused is None:
            self.stored[after] = new[-1]
        else:
            self._reused = {before: self.stored.pop(before)}
            self.stored[after] = reused

    def _between(self, before: int, after: int) -> list[int]:
        """Numbers of tokens between these, ascending, after which states are stored for other sequences."""
        if not self.interval:
            return []
        last = (after - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        regular = range((before // self.interval + 1) * self.interval, after, self.interval)
        return sorted({*regular, *([last] if last > before else [])})

    def crop(self, tokens: int) -> None:
        """Frees the slots of states after more than `tokens` tokens."""
        for at in [at for at in self.stored if at > tokens]:
            self.slots.release(self.stored.pop(at))

    def check_crop(self, tokens: int) -> None:
        """Raises StateMissingError if the states after `tokens` tokens are not stored."""
        if tokens and tokens not in self.stored:
            raise StateMissingError(tokens, self.latest(tokens))

    def adopt(self, tokens: int, slot: int) -> None:
        """Starts with the states after `tokens` tokens in `slot`; the caller has counted the sequence among its users."""
        self.stored = {tokens: slot}

    def fork(self) -> SequenceStates:
        """States of a sequence with the same content; slots are shared."""
        twin = SequenceStates(self.slots, self.interval)
        twin.stored = dict(self.stored)
        for slot in twin.stored.values():
            self.slots.retain(slot)
        return twin
