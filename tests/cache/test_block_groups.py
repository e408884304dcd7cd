"""Sequences with a table of blocks per group of layers, against a plain model of what each group must still hold."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from deepseek_optimizer.cache import HOLE, BlockManager, Forgetting, Groups, SequenceBlocks
from deepseek_optimizer.cache.forgetting import max_blocks, max_tokens
from deepseek_optimizer.cache.prefix_cache import PrefixCache, keys, of_group
from deepseek_optimizer.errors import CacheFullError, DroppedTokensError

WINDOW = Forgetting(window=64, sinks=0, spare=32)


def seen_blocks(forgetting: Forgetting | None, tokens: int) -> set[int]:
    """Indices of the blocks that a group's token number `tokens` attends to, without its own; by the definition."""
    if forgetting is None:
        return set(range(-(-tokens // 32)))
    return {t // 32 for t in range(tokens) if tokens - t < forgetting.window or t < forgetting.sinks}


def random_groups(rng: random.Random) -> Groups:
    windows = [
        Forgetting(rng.randrange(1, 150), rng.choice((0, 0, 40)), rng.randrange(0, 40)) for _ in range(rng.randint(1, 2))
    ]
    return (*(None for _ in range(rng.randint(1, 2))), *windows)


class Model:
    """A manager, and the marks of the tokens that were written to each block."""

    def __init__(self, blocks: int, groups: Groups) -> None:
        self.manager = BlockManager(blocks, groups)
        self.cells: dict[tuple[int, int], object] = {}
        self.live: list[tuple[SequenceBlocks, list[object]]] = []

    def new(self) -> tuple[SequenceBlocks, list[object]]:
        self.live.append((SequenceBlocks(self.manager), []))
        return self.live[-1]

    def copy(self, copies: list[tuple[int, int]]) -> None:
        for source, target in copies:
            self.cells.update({(target, i): self.cells.get((source, i)) for i in range(32)})

    def append(self, made: SequenceBlocks, marks: list[object], new: list[object]) -> bool:
        start, before = made.tokens, [list(table.blocks) for table in made.tables]
        try:
            self.copy(made.append(len(new)))
        except CacheFullError:
            assert [table.blocks for table in made.tables] == before and made.tokens == start
            return False
        for token, mark in enumerate(new, start):
            for table in made.tables:
                self.cells[table.blocks[token // 32], token % 32] = mark
        marks += new
        return True

    def drop(self, made: SequenceBlocks, marks: list[object], first: int, count: int) -> None:
        def move(copies: list[tuple[int, int]], tables: list[list[int]]) -> None:
            self.copy(copies)
            for block in {b for table in tables for b in table if b != HOLE}:
                for i in range(32):
                    self.cells[block, i] = ("moved", self.cells.get((block, i)))

        before = [list(table.blocks) for table in made.tables]
        try:
            made.drop(first, count, move)
        except (CacheFullError, DroppedTokensError):
            assert [table.blocks for table in made.tables] == before
            return
        marks[32 * first :] = [("moved", mark) for mark in marks[32 * (first + count) :]]

    def check(self, cached: Counter[int] | None = None) -> None:
        """Every group of every sequence has what its next token attends to, and the manager's counts are right."""
        held = Counter(cached or {})
        for made, marks in self.live:
            assert len(marks) == made.tokens and len({len(table.blocks) for table in made.tables}) == 1
            for table in made.tables:
                held.update(b for b in table.blocks if b != HOLE)
                assert [n for n, b in enumerate(table.blocks) if b == HOLE] == list(table.holes)
                for place in seen_blocks(table.forgetting, made.tokens):
                    tokens = range(32 * place, min(32 * place + 32, made.tokens))
                    assert [self.cells[table.blocks[place], t % 32] for t in tokens] == [marks[t] for t in tokens]
        assert self.manager.free_blocks == self.manager.num_blocks - len(held)
        assert all(self.manager.users(block) == count for block, count in held.items())


@pytest.mark.parametrize("seed", range(20))
def test_random_use(seed: int) -> None:
    rng = random.Random(seed)
    model = Model(70, random_groups(rng))
    for _ in range(120):
        action = rng.choice(("new", "append", "append", "append", "fork", "crop", "drop", "free", "forget", "forget"))
        if action == "new" or not model.live:
            model.append(*model.new(), [object() for _ in range(rng.randrange(80))])
            continue
        made, marks = model.live[at := rng.randrange(len(model.live))]
        if action == "append":
            model.append(made, marks, [object() for _ in range(rng.randrange(90))])
        elif action == "fork" and len(model.live) < 6:
            model.live.append((made.fork(), list(marks)))
        elif action == "drop":
            first = max((f.sink_blocks for f in model.manager.groups if f is not None), default=0) + rng.randrange(4)
            if first >= made.tokens // 32:
                continue
            model.drop(made, marks, first, rng.randint(1, made.tokens // 32 - first))
        elif action == "crop":
            back = made.tokens - rng.choice((rng.randint(0, made.tokens), min(made.tokens, 30)))
            lacking = any(t.blocks[b] == HOLE for t in made.tables for b in seen_blocks(t.forgetting, back))
            if lacking:
                with pytest.raises(DroppedTokensError) as raised:
                    made.crop(back)
                assert raised.value.nearest == made.nearest(back) < back
                back = made.nearest(back)
            assert made.nearest(back) == back
            made.crop(back)
            del marks[back:]
        elif action == "forget":
            made.forget()
            assert not made.forgettable
        elif action == "free":
            made.free()
            model.live.pop(at)
        model.check()
    for made, _ in model.live:
        made.free()
    assert model.manager.free_blocks == 70


@pytest.mark.parametrize("seed", range(20))
def test_random_prefixes(seed: int) -> None:
    """A prefix is matched exactly if each group has the blocks that its next token attends to; no evicted block is used."""
    rng = random.Random(seed)
    model = Model(90, random_groups(rng))
    groups, cache = model.manager.groups, PrefixCache(model.manager, whole=rng.random() < 0.2)
    texts = [[rng.randrange(50) for _ in range(320)] for _ in range(2)]
    texts.append([*texts[0][:128], *texts[1][:192]])
    for _ in range(60):
        tokens = rng.choice(texts)[: 32 * rng.randint(1, 10)]
        wanted = keys(tokens, "", len(tokens) // 32)
        longest = 0
        for n in range(1, len(wanted) + 1):
            needed = [(g, b) for g, f in enumerate(cache.groups) for b in seen_blocks(f, 32 * n)]
            if all(of_group(wanted[b], g) in cache._blocks for g, b in needed):
                longest = n
        assert cache.known(wanted) == longest
        made, marks = model.new()
        made.adopt(cache.match(wanted))
        assert made.tokens == 32 * longest
        marks += tokens[: made.tokens]
        model.check(Counter(cache._blocks.values()))
        while made.tokens < len(tokens):
            new = tokens[made.tokens : made.tokens + rng.randint(1, 70)]
            if not model.append(made, marks, list(new)):
                cache.evict(rng.randint(1, 20))
                break
            for n in range(made.tokens // 32):
                for group, table in enumerate(made.tables):
                    cache.put(wanted[n], table.blocks[n], group)
            for group, gone in enumerate(made.forget()):
                cache.expire([wanted[n] for n in gone if n < len(wanted)], group)
            model.check(Counter(cache._blocks.values()))
        if len(model.live) > 1 or rng.random() < 0.7:
            model.live.pop(rng.randrange(len(model.live)))[0].free()
        if rng.random() < 0.3:
            cache.evict(rng.randint(1, 15))
        model.check(Counter(cache._blocks.values()))
    assert len(groups) == len(cache.groups)
    for made, _ in model.live:
        made.free()
    cache.clear()
    assert model.manager.free_blocks == 90


def test_released_blocks_are_evicted_first() -> None:
    """The blocks of the full group, and those of the last window, stay longer than those that the sequence has released."""
    manager = BlockManager(60, (None, WINDOW))
    cache, wanted = PrefixCache(manager), keys(list(range(320)), "", 10)
    made = SequenceBlocks(manager)
    made.append(320)
    for n, key in enumerate(wanted):
        for group, table in enumerate(made.tables):
            cache.put(key, table.blocks[n], group)
    full, (nothing, gone) = list(made.blocks), made.forget()
    assert nothing == range(0) and gone == range(0, 7) and made.held == 13
    cache.expire([wanted[n] for n in gone], 1)
    cache.touch(wanted)
    made.free()
    assert cache.evict(7) == 7 and cache.known(wanted) == 10
    (again, window) = cache.match(wanted)
    assert again == full and window[:8] == [HOLE] * 8 and HOLE not in window[8:]
    assert cache.known(wanted[:7]) == 0


@pytest.mark.parametrize("groups", [(None,), (WINDOW,), (None, WINDOW), (None, *(WINDOW,) * 5), (None, None, WINDOW)])
def test_how_many_tokens_fit(groups: Groups) -> None:
    """`max_tokens` is the inverse of `max_blocks`, which a sequence that releases its blocks never exceeds."""
    for blocks in (0, 1, 5, 17, 40, 100):
        fitting = [n for n in range(0, 4000, 32) if max_blocks(groups, n, 64) <= blocks]
        assert max_tokens(groups, blocks, 64, 3968) == max(fitting)
    manager = BlockManager(400, groups)
    made, most = SequenceBlocks(manager), 0
    for _ in range(40):
        made.append(64)
        most = max(most, manager.num_blocks - manager.free_blocks)
        assert most <= max_blocks(groups, made.tokens, 64)
        made.forget()
    assert most >= max_blocks(groups, made.tokens, 64) - len(groups)


def test_a_sequence_that_stays_whole() -> None:
    made = SequenceBlocks(BlockManager(40, (None, WINDOW)), whole=True)
    made.append(600)
    assert not made.forgettable and made.groups == (None, None) and made.fork().groups == (None, None)
