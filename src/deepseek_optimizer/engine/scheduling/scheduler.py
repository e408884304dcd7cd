"""The scheduler: continuous batching with chunked prefill over paged blocks. Does not import torch.

Decoding sequences take part in every step; the rest of the token budget goes to prompts, in chunks. Blocks are allocated as
tokens are added. If none are free, unused blocks of the prefix cache are evicted first; then the last request by priority and
arrival is preempted: it loses its blocks, waits, and is recomputed from its tokens (or from the part that the prefix cache
still has). Clients take turns, and the client with the most requests is preempted first (`turns`).
"""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...backends.base import DECODE, PREFILL
from ...backends.qualities import EXACT, prompt_quality
from ...cache.block_manager import BLOCK_TOKENS, BlockManager
from ...cache.forgetting import max_blocks
from ...cache.prefix_cache import PrefixCache, keys
from ...cache.prefix_parts import Part
from ...errors import CacheFullError
from ..running import Running
from . import partial_blocks
from .batch_size import BatchSize
from .budget import PromptBudget
from .policy import StepLimits
from .prefix_store import WRITE_SECONDS, PrefixStore
from .sliding import Sliding
from .store import Store
from .turns import Turns, alternating, first_to_yield, in_turn, place_for

if TYPE_CHECKING:
    from .memory import Memory

_log = logging.getLogger(__name__)
_READ_WAIT = 0.02  # seconds that a step without anything to run waits for blocks that are being read


@dataclass
class ScheduledChunk:
    """The tokens of one request in a step.

    Attributes:
        running: the request.
        start: slot of the first token in the request's cache.
        count: number of tokens, without drafts.
        phase: DECODE, or PREFILL for prompt tokens.
        ends: whether the request's last token is included, so that the step samples its next one.
        drafts: draft tokens, processed after the last token.
        preempted: the request's number of preemptions when the chunk was scheduled; a later preemption makes it invalid.
    """

    running: Running
    start: int
    count: int
    phase: int
    ends: bool
    drafts: list[int] = field(default_factory=list)
    preempted: int = 0

    @property
    def valid(self) -> bool:
        """Whether the request has not been preempted since."""
        return self.preempted == self.running.preempted


class Scheduler:
    """Schedules requests into steps and allocates their blocks.

    Args:
        memory: the cache memory.
        budget: chooses the number of prompt tokens in a step.
        batch: chooses the batch size.
        prefix: the prefix cache; None: prompts do not share blocks.
        sliding: slides the windows of sequences; None: there are no windows.
        max_prompt_logits: maximum number of prompt tokens in a step whose log probabilities are requested.
        invariant: process prompts with the decode kernels, too.
        lost: called with each request that loses its blocks.
        store: the prefix cache's second level; None: there is none.
    """

    def __init__(
        self,
        memory: Memory,
        budget: PromptBudget,
        batch: BatchSize,
        prefix: PrefixCache | None,
        sliding: Sliding | None = None,
        *,
        max_prompt_logits: int = 1 << 31,
        invariant: bool = False,
        lost: Callable[[Running], None] = lambda _: None,
        store: Store | None = None,
    ) -> None:
        self.memory, self.budget, self.batch, self.prefix, self.sliding = memory, budget, batch, prefix, sliding
        self._prompt_phase = DECODE if invariant else PREFILL
        self.waiting: list[Running] = []  # in scheduling order
        self.running: list[Running] = []  # in scheduling order
        self.preemptions = self.urgent_preemptions = 0  # of all requests, and of those that are not meant to wait
        self.chunks: dict[Running, ScheduledChunk] = {}  # of the step that is being scheduled
        self._lost = lost
        self.stored = None if store is None or prefix is None else PrefixStore(store, memory, prefix)
        self._max_prompt_logits = self._logits_left = max_prompt_logits  # and what the step being scheduled has left of it
        self._shortest_turn = False
        self._admission_turns, self._prompt_turns = Turns(), Turns()

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def limit(self, limits: StepLimits) -> None:
        """Sets the limits of the next step."""
        self.budget.limit(limits.step_tokens, limits.stall)
        self.batch.limit(limits.batch)

    def wait_for_stored(self) -> bool:
        """Waits a moment if blocks are being read from the prefix cache's second level; returns whether there are any."""
        return self.stored is not None and self.stored.reader.wait(_READ_WAIT)

    def close(self) -> None:
        """Writes the rest of the prefix cache to its second level. Nothing may be scheduled afterwards."""
        if self.stored is not None and not self.stored.close(WRITE_SECONDS):
            _log.warning("the prefix cache was not written completely within %g s", WRITE_SECONDS)

    def add(self, running: Running) -> None:
        insort(self.waiting, running, key=lambda r: r.order)

    def remove(self, running: Running) -> None:
        """Removes a request that has ended and frees its blocks, except those that the prefix cache holds."""
        if running in self.waiting:
            self.waiting.remove(running)
            return
        self.running.remove(running)
        self._free(running)

    def decoders(self, max_drafts: dict[Running, int]) -> list[ScheduledChunk]:
        """Schedules the decoding requests, each with room in the cache for its token and drafts.

        Args:
            max_drafts: number of drafts to reserve room for; updated where there is less room.
        """
        chunks: list[ScheduledChunk] = []
        self.chunks.clear()
        for running in [r for r in self.running if r.decoding]:
            if running not in self.running:  # preempted by an earlier one
                continue
            count = max_drafts.get(running, 0)
            if count and self.sliding is not None:
                max_drafts[running] = count = min(count, self.sliding.max_new_tokens(running) - 1)
            if count and not self._extend(running, 1 + count, undo=count):
                max_drafts[running] = count = 0
            if count or self._extend_or_preempt(running, 1):
                start = running.sequence.cached - 1 - count
                self._add(chunks, ScheduledChunk(running, start, 1, DECODE, True, preempted=running.preempted))
        return chunks

    def _add(self, chunks: list[ScheduledChunk], chunk: ScheduledChunk) -> None:
        chunks.append(chunk)
        self.chunks[chunk.running] = chunk

    def prompts(self, decoding: int) -> list[ScheduledChunk]:
        """Admits waiting requests and schedules prompt tokens for a step with `decoding` decoding rows.

        Prompts are processed in scheduling order, except that half of the room goes to the shortest one, so that a short
        prompt need not wait for a long one.
        """
        self._admit_waiting()
        chunks: list[ScheduledChunk] = []
        self._logits_left = self._max_prompt_logits
        room = self.budget.tokens(decoding)
        # The tokens of decoding requests have all been processed.
        filling = alternating([r for r in self.running if r.missing and not r.decoding], self._prompt_turns)
        if len(filling) > 1:
            first, shortest = filling[0], min(filling, key=lambda r: (r.request.priority, r.missing))
            if shortest is not first and shortest.request.priority == first.request.priority:
                half = room // 2
                if half < (self.budget.fixed or 1):  # room for a chunk of one of the two: they alternate
                    self._shortest_turn = not self._shortest_turn
                    half = room if self._shortest_turn else 0
                if half:
                    room -= self._add_prompt(shortest, half, chunks)
                    filling.remove(shortest)
        for running in filling:
            if room <= 0:
                break
            if running in self.running:  # not preempted by an earlier one
                room -= self._add_prompt(running, room, chunks)
        for chunk in chunks:
            self._prompt_turns.record(chunk.running.request.client, self.running)
        return chunks

    def _add_prompt(self, running: Running, room: int, chunks: list[ScheduledChunk]) -> int:
        """Schedules a chunk of a prompt, of at most `room` tokens; returns its number of tokens."""
        start, missing = running.sequence.cached, running.missing
        with_logits = running.prompt_logprobs is not None and not running.prompt_logprobs.complete
        if with_logits:
            room = min(room, self._logits_left)
        if start < running.prompt:
            count, phase = self.budget.part(start, min(missing, running.prompt - start), room), self._prompt_phase
        else:  # generated text is recomputed by the kernels that computed it, so that it stays the same
            count, phase = min(missing, room), DECODE
        if self.sliding is not None:
            count = min(count, self.sliding.max_new_tokens(running))
        if count > 0 and running.request.pictures is not None:
            count = running.request.pictures.whole(start, count)
        if count <= 0 or not self._extend_or_preempt(running, count):
            return 0
        if with_logits:
            self._logits_left -= count
        start = running.sequence.cached - count  # its window may have slid
        self._add(chunks, ScheduledChunk(running, start, count, phase, count == missing, preempted=running.preempted))
        return count

    def _admit_waiting(self) -> None:
        """Admits waiting requests, with clients taking turns, while there are places in the batch and blocks."""
        if self.stored is not None:
            self.stored.reader.collect()
        if not self.waiting:
            return
        batch_size = self.batch.choose()
        filling = self._being_filled()
        for running in in_turn(self.waiting, self.running, self._admission_turns):
            full = len(self.running) >= batch_size
            if full and place_for(running, self.running) is None:
                return
            use_prefix = self.prefix is not None and not running.request.embed
            if use_prefix and (self._prefix_in_progress(running, filling) or self._being_restored(running)):
                continue
            if full:
                self._make_place(running)
            while not self._admit(running, use_prefix):
                if not self._make_place(running):
                    return
            self._admission_turns.record(running.request.client, [*self.waiting, *self.running])
            filling.update(running.keys[running.registered :])

    def _make_place(self, newcomer: Running) -> bool:
        """Preempts a request of a client with several, if the newcomer's client has none; returns whether it did."""
        victim = place_for(newcomer, self.running)
        if victim is None:
            return False
        self.preempt(victim)
        return True

    def _prefix_in_progress(self, running: Running, filling: set[bytes]) -> bool:
        """Whether another request is computing the next block of its prefix; it then waits for that block in the cache."""
        assert self.prefix is not None
        self._compute_keys(running, (len(running.sequence.tokens) - 1) // BLOCK_TOKENS)
        if running.reusable < len(running.sequence.tokens) - 1:  # it does not wait for blocks that it cannot use
            return False
        known = self.prefix.known(running.keys)
        if self.memory.state_interval:  # it can continue only after some of the blocks that the other request computes
            return not filling.isdisjoint(running.keys[known:])
        return known < len(running.keys) and running.keys[known] in filling

    def _being_restored(self, running: Running) -> bool:
        """Whether blocks of its prefix are being read from the prefix cache's second level; it then waits for them."""
        if self.stored is None:
            return False
        wanted = running.keys[: (len(running.sequence.tokens) - 1) // BLOCK_TOKENS]
        if self.stored.reader.reading(wanted):
            return True
        if running.restored:
            return False
        with self.memory.locked() as manager:
            reserved = self._reserved(manager)
        running.restored = self.stored.reader.begin(wanted, reserved, lambda n: partial_blocks.candidates(running, n))
        return running.restored

    def _reserved(self, manager: BlockManager) -> int:
        """Number of blocks that the running requests need for their current tokens and for one more step."""
        return sum(self._missing_blocks(r) for r in self.running) + len(self.running) * len(manager.groups)

    def _being_filled(self) -> set[bytes]:
        filling = (r for r in self.running if r.missing and not r.decoding)
        return {key for r in filling for key in r.keys[r.registered : r.shareable]}

    def _admit(self, running: Running, use_prefix: bool) -> bool:
        """Admits a request if there are enough blocks for its prompt and for the running requests; returns whether it did."""
        sequence = running.sequence
        with self.memory.locked() as manager:
            if use_prefix:
                assert self.prefix is not None
                full = running.reusable // BLOCK_TOKENS
                tables = self.prefix.match(running.keys[:full], lambda n: partial_blocks.candidates(running, n))
                sequence.blocks.adopt(tables, self.prefix.state_after(running.keys[: len(tables[0])]))
                running.registered = len(sequence.blocks.blocks)
            more = self._missing_blocks(running) + self._reserved(manager) - manager.free_blocks
            lacks_blocks = more > 0 and not (self.prefix and self.prefix.can_evict(more))
            if self.running and (lacks_blocks or self._lacks_slots(manager)):
                sequence.blocks.free()
                running.registered = 0
                return False
            if self.prefix is not None and use_prefix:
                partial_blocks.adopt(running, self.prefix)
        if not running.preempted:
            running.cached = sequence.cached
        self.waiting.remove(running)
        insort(self.running, running, key=lambda r: r.order)
        return True

    def _lacks_slots(self, manager: BlockManager) -> bool:
        """Whether there are too few slots for the recurrent states of one more request."""
        if manager.slots is None:
            return False
        return manager.slots.free_blocks + (self.prefix.unused_states if self.prefix else 0) < 1

    def _missing_blocks(self, running: Running) -> int:
        """Returns the number of blocks that it needs in addition, until all its current tokens are processed."""
        blocks, tokens = running.sequence.blocks, len(running.sequence.tokens)
        if self.sliding is not None:
            tokens = min(tokens, self.sliding.window)
        step = min(self.budget.max_tokens, max(1, running.missing))
        return max(0, max_blocks(blocks.groups, tokens, step) - blocks.held)

    def forget(self, running: Running) -> None:
        """Frees the blocks that are not visible to any later token of the request.

        If they are visible in no layer, they are removed from the prefix cache too, unless others use them or they are visible
        at the end of its prompt: a next question about the same text continues from there. If layers without a window keep
        their blocks, they stay there as the first ones to be evicted: another text may branch off anywhere.
        """
        blocks = running.sequence.blocks
        if not blocks.forgettable:
            return
        with self.memory.locked() as manager:
            if manager.forgetting is None:
                self._hold_unconfirmed(running)
            freed = blocks.forget()
            if self.prefix is None:
                return
            for group, (places, forgetting) in enumerate(zip(freed, blocks.groups, strict=True)):
                if forgetting is None:
                    continue
                kept = range(forgetting.first_kept(running.prompt), running.prompt // BLOCK_TOKENS)
                registered = range(places.start, min(places.stop, running.registered))
                unseen = [running.keys[place] for place in registered if place not in kept]
                if manager.forgetting is None:
                    self.prefix.expire(unseen, group)
                else:
                    self.prefix.forget_unused(unseen, group)

    def _hold_unconfirmed(self, running: Running) -> None:
        """Lets the prefix cache hold the blocks that the request is about to release before they are registered."""
        if self.prefix is None or running.request.embed:
            return
        blocks = running.sequence.blocks
        for group, table in enumerate(blocks.tables):
            places = table.forgettable(blocks.tokens)
            last = places.stop if running.shareable is None else min(places.stop, running.shareable)
            self._compute_keys(running, last)
            for place in range(max(places.start, running.registered), last):
                self.prefix.put_unconfirmed(running.keys[place], table.blocks[place], group, running.number)
                running.unconfirmed.append((group, place))

    def _hold_states(self, running: Running) -> None:
        """Lets the prefix cache hold the recurrent states at regular intervals that the next step frees before they are
        registered: only the last step of a prompt computes logits. The lock must be held."""
        states = running.sequence.blocks.states
        if self.prefix is None or states is None or not states.interval:
            return
        for tokens, slot in states.stored.items():
            block = tokens // BLOCK_TOKENS
            regular = tokens % states.interval == 0 and running.registered < block and block not in running.unconfirmed_states
            if regular and (running.shareable is None or block <= running.shareable):
                self._compute_keys(running, block)
                self.prefix.put_unconfirmed_state(running.keys[block - 1], slot, running.number)
                running.unconfirmed_states.append(block)

    def computed(self, running: Running, tokens: int) -> None:
        """Registers full blocks in the prefix cache, once finite logits have been computed from them.

        Args:
            running: the request.
            tokens: number of its first tokens that have been processed.
        """
        if self.prefix is None or running.request.embed:
            return
        running.confirmed = tokens
        full = tokens // BLOCK_TOKENS
        if running.shareable is not None:
            full = min(full, running.shareable)
        if full <= running.registered:
            return
        self._compute_keys(running, full)
        with self.memory.locked():
            for n in range(running.registered, full):
                for group, table in enumerate(running.sequence.blocks.tables):
                    self.prefix.put(running.keys[n], table.blocks[n], group)
            running.registered = full
            for group, place in running.unconfirmed:
                self.prefix.confirm(running.keys[place], group, running.number)
            running.unconfirmed.clear()
            for block in [block for block in running.unconfirmed_states if block <= full]:
                self.prefix.confirm_state(running.keys[block - 1], running.number)
                running.unconfirmed_states.remove(block)
            self._put_states(running, ended=False)

    def _put_states(self, running: Running, ended: bool) -> None:
        """Adds stored recurrent states to the prefix cache: at regular intervals, and the last ones of the prompt and of the
        whole text, from which a next question continues. The lock must be held."""
        states = running.sequence.blocks.states
        if states is None or self.prefix is None:
            return
        last = states.latest(running.registered * BLOCK_TOKENS)
        ends = {running.prompt // BLOCK_TOKENS * BLOCK_TOKENS, (running.prompt - 1) // BLOCK_TOKENS * BLOCK_TOKENS}
        for tokens, slot in states.stored.items():
            block = tokens // BLOCK_TOKENS
            if tokens % BLOCK_TOKENS or not 0 < block <= running.registered:
                continue
            if tokens % states.interval == 0 or tokens in ends or (ended and tokens == last):
                self.prefix.put_state(running.keys[block - 1], slot)

    def _compute_keys(self, running: Running, blocks: int) -> None:
        if len(running.keys) < blocks:
            tokens, salt = running.sequence.tokens, running.request.salt
            adapter = b"" if running.adapter is None else running.adapter.identity
            pictures = running.request.pictures
            besides = {} if pictures is None else {"besides": pictures.digest}
            quality = prompt_quality(running.sequence.quality)  # of the blocks that are shared
            running.keys = keys(
                tokens, salt, blocks, running.keys, frequencies=running.frequencies, adapter=adapter,
                quality=b"" if quality == EXACT else quality.encode(), **besides,
            )  # fmt: skip

    def _free(self, running: Running) -> None:
        with self.memory.locked():
            if self.prefix is not None:
                for group, place in running.unconfirmed:
                    self.prefix.forget_unconfirmed([running.keys[place]], group, running.number)
                running.unconfirmed.clear()
                held = [running.keys[block - 1] for block in running.unconfirmed_states]
                self.prefix.forget_unconfirmed_states(held, running.number)
                running.unconfirmed_states.clear()
                self._put_states(running, ended=True)
                if len(running.sequence.blocks.tables) > 1:  # blocks that are visible at the end of the prompt, but no longer
                    self.prefix.touch(running.keys[: min(running.prompt // BLOCK_TOKENS, running.registered)])
                partial = partial_blocks.put(running, self.prefix)
                self.prefix.touch(running.keys[: running.registered])
                self._save(running, partial)
            running.sequence.blocks.free()
        running.registered = running.confirmed = 0

    def _save(self, running: Running, partial: list[Part]) -> None:
        """Has what the prefix cache holds of the text, its partly filled block included, written to its second level. The lock
        must be held."""
        if self.stored is None or self.prefix is None or not running.registered:
            return
        parts = self.prefix.parts(running.keys[: running.registered])
        if len(running.sequence.blocks.tables) > 1:
            parts += self.prefix.parts(running.keys[: min(running.prompt // BLOCK_TOKENS, running.registered)])
        self.stored.writer.save(list(dict.fromkeys([*parts, *partial])))

    def _extend(self, running: Running, count: int, undo: int = 0) -> bool:
        """Reserves room for `count` more tokens, by sliding its own window and evicting from the prefix cache only. The last
        `undo` of them may be cropped afterwards."""
        if self.sliding is not None and not self.sliding.slide(running, count):
            return False
        blocks = running.sequence.blocks
        if blocks.fits(count):  # the usual case: no new block is needed
            blocks.tokens += count
            return True
        with self.memory.locked() as manager:
            self._hold_states(running)
            while True:
                try:
                    self.memory.copy_blocks(blocks.append(count, undo))
                    return True
                except CacheFullError as error:
                    if not self._make_free(manager, error):
                        return False

    def _make_free(self, manager: BlockManager, error: CacheFullError) -> bool:
        """Evicts blocks from the prefix cache, or else takes those that are being read from files. Returns whether the
        allocation that failed may succeed now. The lock must be held."""
        missing = error.needed - error.free
        # slots were evicted as far as possible
        if error.unit == "block" and self.prefix is not None and self.prefix.evict(missing) >= missing:
            return True
        return self.stored is not None and self.stored.reader.abandon(manager)

    def _extend_or_preempt(self, running: Running, count: int) -> bool:
        """Reserves room for `count` more tokens, if necessary by shrinking windows and preempting other requests.

        Returns: False if the request itself was preempted.
        """
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
        """Whether its window may shrink now: this step processes none of its tokens, or only the last ones of its text."""
        chunk = self.chunks.get(running)
        return not running.request.embed and (chunk is None or chunk.count == 1)

    def preempt(self, victim: Running) -> None:
        """Preempts a request: frees its blocks and lets it wait, to be recomputed from its current tokens."""
        self.running.remove(victim)
        self._free(victim)
        self._lost(victim)
        victim.pooler = victim.unmoved = None
        victim.restored = False
        victim.preempted += 1
        self.preemptions += 1
        self.urgent_preemptions += not victim.request.patient
        self.add(victim)
