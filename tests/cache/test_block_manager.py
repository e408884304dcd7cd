"""The block manager against a simple model of blocks and sequences."""

from __future__ import annotations

import ast
import inspect
import random
from collections import Counter
from pathlib import Path

import pytest

from deepseek_optimizer.cache import BlockManager, SequenceBlocks
from deepseek_optimizer.errors import CacheFullError


def sequence(manager: BlockManager, tokens: int) -> SequenceBlocks:
    made = SequenceBlocks(manager)
    made.append(tokens)
    return made


def test_lowest_free_block_comes_first() -> None:
    manager = BlockManager(8)
    a, b, c = (sequence(manager, 64) for _ in range(3))
    assert (a.blocks, b.blocks, c.blocks) == ([0, 1], [2, 3], [4, 5])
    b.free()
    a.crop(32)
    assert sequence(manager, 97).blocks == [1, 2, 3, 6]
    assert manager.free_blocks == 1 and manager.high_water == 7


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (65, 3)])
def test_blocks_cover_the_tokens(tokens: int, blocks: int) -> None:
    made = sequence(BlockManager(9), tokens)
    assert len(made.blocks) == blocks and made.tokens == tokens
    assert made.table().dtype == "int32" and made.table().tolist() == made.blocks


def test_errors_of_a_full_cache_change_nothing() -> None:
    manager = BlockManager(2)
    made = sequence(manager, 40)
    with pytest.raises(CacheFullError) as error:
        made.append(25)
    assert (error.value.needed, error.value.free) == (1, 0)
    assert made.tokens == 40 and made.blocks == [0, 1]
    assert made.append(24) == []


def test_fork_copies_on_write() -> None:
    manager = BlockManager(4)
    first = sequence(manager, 40)
    second = first.fork()
    assert second.blocks == first.blocks and manager.users(1) == 2 and manager.free_blocks == 2
    assert second.append(1) == [(1, 2)]  # the partial block is copied, the full one stays shared
    assert (first.blocks, second.blocks) == ([0, 1], [0, 2])
    assert first.append(1) == []  # now the only user
    first.free()
    assert manager.users(0) == 1 and manager.users(1) == 0


def test_fork_at_a_block_boundary_copies_nothing() -> None:
    manager = BlockManager(4)
    first = sequence(manager, 32)
    second = first.fork()
    assert second.append(1) == [] and second.blocks == [0, 1]


def test_no_block_for_the_copy() -> None:
    manager = BlockManager(2)
    first = sequence(manager, 40)
    second = first.fork()
    with pytest.raises(CacheFullError):
        second.append(1)
    assert second.blocks == first.blocks and manager.users(1) == 2


def test_drop_from_the_middle() -> None:
    manager, seen = BlockManager(8), []
    made = sequence(manager, 150)
    made.drop(1, 2, lambda copies, tables: seen.append((copies, *tables)))
    assert made.blocks == [0, 3, 4] and made.tokens == 150 - 64 and manager.free_blocks == 5
    assert seen == [([], [3, 4])]
    made.drop(1, 0, lambda copies, behind: pytest.fail("nothing is dropped, so nothing moves"))
    made.drop(1, 1, lambda copies, tables: seen.append((copies, *tables)))
    assert made.blocks == [0, 4] and made.tokens == 150 - 96


def test_drop_copies_shared_blocks_after_the_gap() -> None:
    manager, seen = BlockManager(8), []
    first = sequence(manager, 128)
    second = first.fork()
    second.append(5)
    second.drop(1, 1, lambda copies, tables: seen.append((copies, *tables)))
    assert seen == [([(2, 5), (3, 6)], [5, 6, 4])]
    assert (first.blocks, second.blocks) == ([0, 1, 2, 3], [0, 5, 6, 4])
    assert [manager.users(b) for b in range(8)] == [2, 1, 1, 1, 1, 1, 1, 0]


def test_a_failed_drop_changes_nothing() -> None:
    manager = BlockManager(6)
    first = sequence(manager, 128)
    second = first.fork()

    def fail(copies: object, behind: object) -> None:
        raise RuntimeError("the store is broken")

    with pytest.raises(RuntimeError, match="broken"):
        second.drop(1, 1, fail)
    assert second.blocks == first.blocks and second.tokens == 128 and manager.free_blocks == 2
    with pytest.raises(CacheFullError) as error:
        second.drop(0, 1, fail)  # three copies, two free blocks
    assert (error.value.needed, error.value.free) == (3, 2)
    assert second.blocks == first.blocks and [manager.users(b) for b in range(4)] == [2] * 4 and manager.free_blocks == 2


@pytest.mark.parametrize("run", [(-1, 1), (0, -1), (0, 5), (3, 1), (4, 0)])
def test_only_full_blocks_can_be_dropped(run: tuple[int, int]) -> None:
    made = sequence(BlockManager(8), 120)
    with pytest.raises(ValueError, match="full blocks"):
        made.drop(*run, lambda copies, behind: None)
    assert len(made.blocks) == 4 and made.tokens == 120


@pytest.mark.parametrize(
    "call", [lambda s: s.append(-1), lambda s: s.crop(-1), lambda s: s.crop(11), lambda s: BlockManager(-1)]
)
def test_invalid_arguments(call: object) -> None:
    with pytest.raises(ValueError):
        call(sequence(BlockManager(2), 10))  # type: ignore[operator]


@pytest.mark.parametrize("seed", range(40))
def test_random_use_preserves_the_tokens_of_every_sequence(seed: int) -> None:
    """Each sequence writes its own marks, which must be intact whenever they are read, after any fork, crop or drop. Tokens
    that moved are marked again, as a store would rotate their keys, which must not affect other sequences."""
    rng = random.Random(seed)
    manager = BlockManager(24)
    bytes_: dict[tuple[int, int], object] = {}  # (block, place) -> mark
    live: list[tuple[SequenceBlocks, list[object]]] = []

    def append(made: SequenceBlocks, marks: list[object], count: int) -> None:
        start, free = made.tokens, manager.free_blocks
        try:
            copies = made.append(count)
        except CacheFullError:
            assert made.tokens == start and manager.free_blocks == free
            return
        for source, target in copies:
            bytes_.update({(target, i): bytes_.get((source, i)) for i in range(32)})
        for token in range(start, made.tokens):
            marks.append(object())
            bytes_[made.blocks[token // 32], token % 32] = marks[-1]

    def drop(made: SequenceBlocks, marks: list[object]) -> None:
        first = rng.randint(0, made.tokens // 32)
        count = rng.randint(0, made.tokens // 32 - first)
        before, free = list(made.blocks), manager.free_blocks

        def move(copies: list[tuple[int, int]], tables: list[list[int]]) -> None:
            (behind,) = tables
            for source, target in copies:
                bytes_.update({(target, i): bytes_.get((source, i)) for i in range(32)})
            for block in behind:
                for i in range(32):
                    bytes_[block, i] = ("moved", bytes_.get((block, i)))
            assert len(behind) == len(before) - first - count

        try:
            made.drop(first, count, move)
        except CacheFullError:
            assert made.blocks == before and manager.free_blocks == free
            return
        if count:
            marks[32 * first :] = [("moved", mark) for mark in marks[32 * (first + count) :]]

    for _ in range(200):
        action = rng.choice(("new", "append", "append", "fork", "crop", "drop", "free"))
        if action == "new" or not live:
            live.append((SequenceBlocks(manager), []))
            append(*live[-1], rng.randrange(80))
            continue
        at = rng.randrange(len(live))
        made, marks = live[at]
        if action == "append":
            append(made, marks, rng.randrange(50))
        elif action == "fork":
            live.append((made.fork(), list(marks)))
        elif action == "drop":
            drop(made, marks)
        elif action == "crop":
            made.crop(rng.randint(0, made.tokens))
            del marks[made.tokens :]
        else:
            made.free()
            live.pop(at)
        for other, expected in live:
            assert [bytes_[other.blocks[t // 32], t % 32] for t in range(other.tokens)] == expected
        held = Counter(b for other, _ in live for b in other.blocks)
        assert manager.free_blocks == 24 - len(held) and all(manager.users(b) == n for b, n in held.items())
        assert manager.high_water == max(held, default=-1) + 1
    for made, _ in live:
        made.free()
    assert manager.free_blocks == 24 and manager.high_water == 0


def test_torch_is_not_imported() -> None:
    """The package's `__init__` may import torch; this subpackage must not."""
    source = Path(inspect.getfile(BlockManager)).read_text()
    imported = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in ast.walk(ast.parse(source))
                if isinstance(n, (ast.Import, ast.ImportFrom))}  # fmt: skip
    own = {"block_table", "errors", "forgetting", "sequence_states"}
    assert imported <= {"__future__", "collections.abc", "heapq", "numpy", "numpy.typing", "typing"} | own


class Rationed:
    """Memory for `room` blocks, granted in steps of `step`."""

    def __init__(self, room: int, step: int = 1) -> None:
        self.room, self.step, self.asked = room, step, []
        self.shortage: str | None = None

    def grow(self, wanted: int, backed: int) -> int:
        self.asked.append((wanted, backed))
        self.shortage = None if wanted <= self.room else "the memory is others'"
        return backed if self.shortage else min(self.room, max(wanted, backed + self.step))


def test_memory_is_reserved_before_a_block_is_used() -> None:
    growth = Rationed(room=8, step=4)
    manager = BlockManager(8, growth=growth)
    first = sequence(manager, 32)
    assert growth.asked == [(1, 0)]
    second = sequence(manager, 96)  # within the step
    first.free()
    sequence(manager, 32)  # a block that already has memory
    assert growth.asked == [(1, 0)]
    second.append(32)
    assert growth.asked == [(1, 0), (5, 4)]


def test_a_cache_without_memory_is_full_and_gives_the_reason() -> None:
    growth = Rationed(room=3)
    manager = BlockManager(8, growth=growth)
    made = sequence(manager, 64)
    with pytest.raises(CacheFullError, match="the memory is others'") as error:
        made.append(64)
    assert (error.value.needed, error.value.free) == (2, 0) and made.blocks == [0, 1]
    assert manager.limited and manager.free_blocks == 0 and manager.shortage == "the memory is others'"
    with pytest.raises(CacheFullError):
        made.append(64)
    assert len(growth.asked) == 2  # not asked again before the limit is raised
    made.crop(32)
    assert manager.free_blocks == 1 and sequence(manager, 32).blocks == [1]
    growth.room = 8
    manager.lift_limit()
    assert manager.free_blocks == 6
    made.append(96)
    assert not manager.limited and manager.shortage is None and manager.free_blocks == 3


def test_returned_memory_is_reserved_again() -> None:
    growth = Rationed(room=8)
    manager = BlockManager(8, growth=growth)
    made = sequence(manager, 96)
    with pytest.raises(ValueError, match="3 blocks are in use"):
        manager.clear()
    made.free()
    manager.clear()
    assert sequence(manager, 32).blocks == [0] and growth.asked == [(3, 0), (1, 0)]
