"""Which slots a sequence's recurrent states take, keep and free."""

from __future__ import annotations

import pytest

from deepseek_optimizer.cache import BlockManager, SequenceBlocks
from deepseek_optimizer.errors import CacheFullError, StateMissingError


def manager(slots: int = 8) -> BlockManager:
    return BlockManager(64, slots=BlockManager(slots))


def used(sequence: SequenceBlocks) -> int:
    slots = sequence.manager.slots
    assert slots is not None
    return slots.num_blocks - slots.free_blocks


def test_one_slot_is_overwritten_step_by_step() -> None:
    sequence = SequenceBlocks(manager())
    assert sequence.states is not None
    for before, count in ((0, 40), (40, 1), (41, 30)):
        sequence.append(count)
        assert sequence.states.step(before, count) == (0 if before else -1, [(count - 1, 0)])
        assert used(sequence) == 1
    sequence.free()
    assert used(sequence) == 0


def test_a_shared_slot_is_not_overwritten() -> None:
    first = SequenceBlocks(manager())
    first.append(5)
    second = first.fork()
    second.append(1)
    assert first.states is not None and second.states is not None
    assert first.states.stored == {5: 0} and second.states.step(5, 1) == (0, [(0, 1)])
    first.free()
    second.append(1)
    assert used(second) == 1


def test_states_of_full_blocks_are_stored() -> None:
    sequence = SequenceBlocks(manager(), interval=64)
    assert sequence.states is not None
    sequence.append(150)
    assert list(sequence.states.stored) == [64, 128, 150]
    sequence.append(1)
    assert list(sequence.states.stored) == [128, 151]  # the others belong to the prefix cache, if it wants them
    sequence.append(9)
    assert list(sequence.states.stored) == [128, 160]
    sequence.append(1)
    assert list(sequence.states.stored) == [160, 161]
    sequence.crop(160)
    assert list(sequence.states.stored) == [160] and used(sequence) == 1


def test_without_free_slots_only_the_needed_states_are_stored() -> None:
    sequence = SequenceBlocks(manager(slots=2), interval=32)
    assert sequence.states is not None
    sequence.append(100)
    assert list(sequence.states.stored) == [32, 100]
    other = SequenceBlocks(sequence.manager)
    with pytest.raises(CacheFullError):
        other.append(1)
    assert other.tokens == 0 and sequence.manager.free_blocks == 60


def test_every_token_can_be_returned_to_when_drafts_are_verified() -> None:
    sequence = SequenceBlocks(manager())
    assert sequence.states is not None
    sequence.append(10)
    sequence.append(4, undo=4)
    assert sequence.states.step(10, 4) == (0, [(0, 1), (1, 2), (2, 3), (3, 4)])
    sequence.crop(12)
    sequence.append(3, undo=2)
    assert sequence.states.step(12, 3) == (2, [(0, 0), (1, 1), (2, 2)])
    sequence.crop(13)
    sequence.append(1)
    assert used(sequence) == 1


def test_a_step_that_was_not_run_is_undone() -> None:
    sequence = SequenceBlocks(manager())
    sequence.append(10)
    sequence.append(3)
    sequence.crop(10)
    assert sequence.states is not None and sequence.states.stored == {10: 0}
    sequence.append(3)
    sequence.states.step(10, 3)
    with pytest.raises(StateMissingError, match="Crop it to 0 tokens"):
        sequence.crop(12)


def test_slots_are_reclaimed_before_the_cache_is_full() -> None:
    blocks = manager(slots=1)
    assert blocks.slots is not None
    first, second = SequenceBlocks(blocks), SequenceBlocks(blocks)
    first.append(3)
    blocks.slots.reclaim = lambda count: first.free()
    second.append(1)
    assert first.tokens == 0 and second.tokens == 1
