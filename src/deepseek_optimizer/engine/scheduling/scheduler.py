"""Who takes part in the next step, and with how many tokens: continuous batching over paged blocks. No torch.

Decoding sequences take part in every step; what the budget leaves goes to prompts, in pieces. Blocks are taken as tokens come.
Where none are left, unused ones of the prefix cache go first; then whoever is last by priority and arrival loses its own and
waits, to be run again from its tokens (or from what the prefix cache still has of them). Several clients have their
turns, and the one with most loses first (`turns`).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...backends.base import DECODE, PREFILL
from ...cache.block_manager import BLOCK_TOKENS
from ...cache.prefix_cache import PrefixCache, keys
from ...errors import CacheFullError
from ..running import Running
from .batch_size import BatchSize
from .budget import PromptBudget
from .sliding import Sliding
from .turns import Turns, alternating, first_to_yield, in_turn, place_for

if TYPE_CHECKING:
    from .memory import Memory


@dataclass
class ScheduledChunk:
    """What a request has in a step.

    Attributes:
        start: place of its first token in the cache.
        count: tokens that go in, drafts left out.
        phase: DECODE, or PREFILL for tokens of its prompt.
        ends: its last known token is among them: it gets its next one.
        drafts: tokens that go in behind that one.
        preempted: how often its request had lost its blocks when it was made: if that is more by now, it no longer holds.
    """

    running: Running
    start: int
    count: int
    phase: int
    ends: bool
    drafts: list[int] = field(default_factory=list)
    preempted: int = 0

    @property
    def holds(self) -> bool:
        return self.preempted == self.running.preempted


class Scheduler:
    """
    Args:
        memory: where the blocks are.
        prefix: None: no sharing.
        sliding: of windows; None: there are none.
        lost: told of each that loses its blocks.
        invariant: prompts run in the decode family too.
    """

    def __init__(
        self,
        memory: Memory,
        budget: PromptBudget,
        batch: BatchSize,
        prefix: PrefixCache | None,
        sliding: Sliding | None = None,
        *,
        invariant: bool = False,
        lost: Callable[[Running], None] = lambda _: None,
    ) -> None:
        self.memory, self.budget, self.batch, self.prefix, self.sliding = memory, budget, batch, prefix, sliding
        self._prompt_phase = DECODE if invariant else PREFILL
        self.waiting: list[Running] = []  # in order
        self.running: list[Running] = []  # in order
        self.preemptions = 0
        self.shares: dict[Running, ScheduledChunk] = {}  # of the step that is being made up
        self._lost = lost
        self._shortest_rotate = False
        self._admission_turns, self._read = Turns(), Turns()

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, running: Running) -> None:
        insort(self.waiting, running, key=lambda r: r.order)

    def remove(self, running: Running) -> None:
        """It has ended: its blocks are free, but for those that the prefix cache keeps."""
        if running in self.waiting:
            self.waiting.remove(running)
            return
        self.running.remove(running)
        self._free(running)

    def decoders(self, drafts: dict[Running, int]) -> list[ScheduledChunk]:
        """The shares of those that get a token each, with room in the cache for it and so many drafts."""
        found: list[ScheduledChunk] = []
        self.shares.clear()
        for running in [r for r in self.running if r.decoding]:
            if running not in self.running:  # it lost its blocks to one before it
                continue
            most = drafts.get(running, 0)
            if most and self.sliding is not None:
                drafts[running] = most = min(most, self.sliding.most(running) - 1)
            if most and not self._extend(running, 1 + most):
                drafts[running] = most = 0
            if most or self._extend_or_preempt(running, 1):
                start = running.sequence.cached - 1 - most
                self._add(found, ScheduledChunk(running, start, 1, DECODE, True, preempted=running.preempted))
        return found

    def _add(self, found: list[ScheduledChunk], share: ScheduledChunk) -> None:
        found.append(share)
        self.shares[share.running] = share

    def prompts(self, decoding: int) -> list[ScheduledChunk]:
        """The shares of prompts, beside so many rows that decode: in order, but half of the room goes to the shortest, so that
        a short question need not wait for somebody's book."""
        self._admit_waiting()
        found: list[ScheduledChunk] = []
        room = self.budget.tokens(decoding)
        # Of those that decode all is taken in by now.
        filling = alternating([r for r in self.running if r.missing and not r.decoding], self._read)
        if len(filling) > 1:
            first, shortest = filling[0], min(filling, key=lambda r: (r.request.priority, r.missing))
            if shortest is not first and shortest.request.priority == first.request.priority:
                half = room // 2
                if half < (self.budget.fixed or 1):  # a piece for one of the two: in turns
                    self._shortest_rotate = not self._shortest_rotate
                    half = room if self._shortest_rotate else 0
                if half:
                    room -= self._piece(shortest, half, found)
                    filling.remove(shortest)
        for running in filling:
            if room <= 0:
                break
            if running in self.running:  # and has not lost its blocks to one before it
                room -= self._piece(running, room, found)
        for share in found:
            self._read.had(share.running.request.client, self.running)
        return found

    def _piece(self, running: Running, room: int, found: list[ScheduledChunk]) -> int:
        """Tokens of a prompt that were added to the step."""
        start, missing = running.sequence.cached, running.missing
        if start < running.prompt:
            count, phase = self.budget.part(start, min(missing, running.prompt - start), room), self._prompt_phase
        else:  # text that is run again: in the family that it was made in, so that it stays the same
            count, phase = min(missing, room), DECODE
        if self.sliding is not None:
            count = min(count, self.sliding.most(running))
        if count <= 0 or not self._extend_or_preempt(running, count):
            return 0
        start = running.sequence.cached - count  # a window may have slid
        self._add(found, ScheduledChunk(running, start, count, phase, count == missing, preempted=running.preempted))
        return count

    def _admit_waiting(self) -> None:
        """Takes in who waits, one after the other and clients in turns, as long as there are places and blocks."""
        if not self.waiting:
            return
        most = self.batch.choose()
        filling = self._being_filled()
        for running in in_turn(self.waiting, self.running, self._admission_turns):
            full = len(self.running) >= most
            if full and place_for(running, self.running) is None:
                return
            shares = self.prefix is not None and not running.request.embed
            if shares and self._twin_runs(running, filling):
                continue
            if full:
                self._make_place(running)
            while not self._admit(running, shares):
                if not self._make_place(running):
                    return
            self._admission_turns.had(running.request.client, [*self.waiting, *self.running])
            filling.update(running.keys[running.registered :])

    def _make_place(self, newcomer: Running) -> bool:
        """Whether somebody of a client with several gave up its place, and its blocks, for a client that has none."""
        victim = place_for(newcomer, self.running)
        if victim is None:
            return False
        self.preempt(victim)
        return True

    def _twin_runs(self, running: Running, filling: set[bytes]) -> bool:
        """Whether somebody is computing the next block that it needs: it waits, and finds it in the cache."""
        assert self.prefix is not None
        self._know_keys(running, (len(running.sequence.tokens) - 1) // BLOCK_TOKENS)
        known = self.prefix.known(running.keys)
        return known < len(running.keys) and running.keys[known] in filling

    def _being_filled(self) -> set[bytes]:
        filling = (r for r in self.running if r.missing and not r.decoding)
        return {key for r in filling for key in r.keys[r.registered : r.shareable]}

    def _admit(self, running: Running, shares: bool) -> bool:
        sequence = running.sequence
        with self.memory.locked() as manager:
            if shares:
                assert self.prefix is not None
                full = (len(sequence.tokens) - 1) // BLOCK_TOKENS  # one token at least is left to be run
                sequence.blocks.adopt(self.prefix.match(running.keys[:full]))
                running.registered = len(sequence.blocks.blocks)
            promised = sum(self._lacks(r) for r in self.running)
            needed = self._lacks(running) + promised + len(self.running)  # and a block each, so that they can go on
            more = needed - manager.free_blocks
            if self.running and more > 0 and not (self.prefix and self.prefix.can_evict(more)):
                sequence.blocks.free()
                running.registered = 0
                return False
        if not running.preempted:
            running.cached = sequence.cached
        self.waiting.remove(running)
        insort(self.running, running, key=lambda r: r.order)
        return True

    def _lacks(self, running: Running) -> int:
        """Blocks that it will take before it gets its first token, the last of which may be there in part."""
        blocks, tokens = running.sequence.blocks, len(running.sequence.tokens)
        if self.sliding is not None:
            tokens = min(tokens, self.sliding.window)
        most, forgetting = -(-tokens // BLOCK_TOKENS), blocks.manager.forgetting
        if forgetting is not None:
            most = min(most, forgetting.blocks(self.budget.most))
        return max(0, most - blocks.held)

    def forget(self, running: Running) -> None:
        """Lets go of the blocks that none of its later tokens sees; in the prefix cache too, unless others use them, or they
        are what its prompt was read up to: from there the next question about the same text goes on."""
        blocks = running.sequence.blocks
        if not blocks.forgettable:
            return
        with self.memory.locked() as manager:
            gone = blocks.forget()
            if self.prefix is not None and manager.forgetting is not None:
                kept = range(manager.forgetting.first_kept(running.prompt), running.prompt // BLOCK_TOKENS)
                known = range(gone.start, min(gone.stop, running.registered))
                self.prefix.forget_unused([running.keys[place] for place in known if place not in kept])

    def computed(self, running: Running, tokens: int) -> None:
        """Its first so many tokens led to logits that are numbers: others may have its full blocks of them."""
        if self.prefix is None or running.request.embed:
            return
        full = tokens // BLOCK_TOKENS
        if running.shareable is not None:
            full = min(full, running.shareable)
        if full <= running.registered:
            return
        self._know_keys(running, full)
        with self.memory.locked():
            for n in range(running.registered, full):
                self.prefix.put(running.keys[n], running.sequence.blocks.blocks[n])
        running.registered = full

    def _know_keys(self, running: Running, blocks: int) -> None:
        if len(running.keys) < blocks:
            tokens, salt = running.sequence.tokens, running.request.salt
            running.keys = keys(tokens, salt, blocks, running.keys, frequencies=running.frequencies)

    def _free(self, running: Running) -> None:
        with self.memory.locked():
            if self.prefix is not None:
                self.prefix.touch(running.keys[: running.registered])
            running.sequence.blocks.free()
        running.registered = 0

    def _extend(self, running: Running, count: int) -> bool:
        """Room for so many more tokens, at the cost of its own window and of the prefix cache alone."""
        if self.sliding is not None and not self.sliding.slide(running, count):
            return False
        blocks = running.sequence.blocks
        if blocks.fits(count):  # the common step: nothing to ask the manager for
            blocks.tokens += count
            return True
        with self.memory.locked():
            for _ in range(2):
                try:
                    self.memory.copy_blocks(blocks.append(count))
                    return True
                except CacheFullError as error:
                    if self.prefix is None or self.prefix.evict(error.needed - error.free) < error.needed - error.free:
                        return False
        return False

    def _extend_or_preempt(self, running: Running, count: int) -> bool:
        """Room for so many more tokens, at the cost of others' windows and of those behind it; False: it was the last itself,
        and waits now."""
        while not self._extend(running, count):
            if self.sliding is not None and self.sliding.shrink([r for r in self.running if self._may_shrink(r)]):
                continue
            victim = first_to_yield(self.running)
            running.starved += len(self.running) == 1
            self.preempt(victim)
            if victim is running:
                return False
        return True

    def _may_shrink(self, running: Running) -> bool:
        """Whether tokens of it may go now: none are still to be read in this step, but for the last few of a text."""
        share = self.shares.get(running)
        return not running.request.embed and (share is None or share.count == 1)

    def preempt(self, victim: Running) -> None:
        """It loses its blocks and waits. What it will be run from again are the tokens that it has: a text of their own."""
        self.running.remove(victim)
        self._free(victim)
        self._lost(victim)
        victim.states = victim.shareable = None
        victim.preempted += 1
        self.preemptions += 1
        self.add(victim)
