"""Caches that drop tokens: tokens that are still visible stay, the others go, and no block leaks."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from deepseek_optimizer.cache import HOLE, BlockManager, Forgetting, SequenceBlocks
from deepseek_optimizer.cache.forgetting import kept_whole
from deepseek_optimizer.cache.prefix_cache import PrefixCache, keys
from deepseek_optimizer.errors import CacheFullError, DroppedTokensError


def seen_blocks(forgetting: Forgetting, tokens: int) -> set[int]:
    """Indices of the blocks that are visible to token number `tokens`, without its own; by the definition."""
    return {t // 32 for t in range(tokens) if tokens - t < forgetting.window or t < forgetting.sinks}


def read(manager: BlockManager, tokens: int, step: int = 45) -> SequenceBlocks:
    made = SequenceBlocks(manager)
    while made.tokens < tokens:
        made.append(min(step, tokens - made.tokens))
        made.forget()
    return made


@pytest.mark.parametrize("fields", [(100, 4, 32), (1, 0, 0), (32, 33, 1), (64, 0, 300), (4096, 70, 32)])
def test_visible_tokens_are_kept(fields: tuple[int, int, int]) -> None:
    forgetting = Forgetting(*fields)
    for tokens in (*range(0, 200, 7), 1000, 4127, 4128, 9999):
        later = [seen_blocks(forgetting, t) for t in range(max(0, tokens - forgetting.spare), tokens + 1)]
        first = forgetting.first_kept(tokens)
        needed = {b for seen in later for b in seen if b >= forgetting.sink_blocks}
        assert not needed or max(first, forgetting.sink_blocks) == min(needed)
        seen = {b for b in seen_blocks(forgetting, tokens) if b >= forgetting.sink_blocks}
        assert not seen or forgetting.first_seen(tokens) <= min(seen)


@pytest.mark.parametrize("step", [1, 32, 45, 512])
def test_a_long_text_needs_only_its_window(step: int) -> None:
    """A hundred thousand tokens, in at most the documented number of blocks."""
    forgetting = Forgetting(window=200, sinks=40, spare=32)
    manager = BlockManager(forgetting.blocks(step), (forgetting,))
    made, used = SequenceBlocks(manager), 0
    for _ in range(100_000 // step):
        made.append(step)
        used = max(used, manager.num_blocks - manager.free_blocks)
        assert manager.high_water <= manager.num_blocks and made.held == manager.num_blocks - manager.free_blocks
        made.forget()
    assert len(made.blocks) == -(-made.tokens // 32) and used >= forgetting.blocks(step) - 1
    assert made.table()[2] == HOLE and made.blocks[0] >= 0 and made.blocks[1] >= 0
    made.free()
    assert manager.free_blocks == manager.num_blocks and made.blocks == []


def test_sequences_that_release_nothing_early_still_release_copies() -> None:
    window, copies = Forgetting(40, 0, 0), Forgetting(40, 0, 0, copies=True)
    made = SequenceBlocks(BlockManager(40, (None, window, copies)), whole=True)
    made.append(320)
    assert made.forget() == [range(0), range(0), range(8)]
    assert made.groups == kept_whole((None, window, copies)) == (None, None, copies)


def test_without_windows_nothing_is_dropped() -> None:
    made = read(BlockManager(40), 1_000)
    assert made.forget() == [range(0)] and made.held == 32


def test_cropping() -> None:
    manager = BlockManager(40, (Forgetting(window=100, sinks=4, spare=32),))
    made = read(manager, 1_000)
    before = list(made.blocks)
    for tokens in (100, 500, 960, 33):
        with pytest.raises(DroppedTokensError, match=f"from 1000 tokens to {tokens}.*attention_window"):
            made.crop(tokens)
        assert made.blocks == before and made.tokens == 1_000
    made.crop(968)  # the spare tokens, and a few more, since whole blocks are dropped
    assert made.blocks == before[:31] and made.append(40) == []
    made.crop(20)  # in the sinks' block: all earlier tokens are present
    assert made.blocks == before[:1] and made.held == 1 and not made.holes
    made.append(70)
    assert all(block >= 0 for block in made.blocks)


def test_forks_share_remaining_blocks() -> None:
    manager = BlockManager(40, (Forgetting(window=64, sinks=4, spare=32),))
    made = read(manager, 500)
    twin = made.fork()
    held, gone = twin.held, len(made.holes)
    made.append(300)
    made.forget()
    assert len(made.holes) > gone and len(twin.holes) == gone and twin.held == held
    made.free()
    assert all(manager.users(b) == (b != HOLE) for b in twin.blocks)
    twin.free()
    assert manager.free_blocks == 40


@pytest.mark.parametrize("seed", range(40))
def test_random_use(seed: int) -> None:
    """Every sequence always has the blocks that are visible to its next token, with its own marks and no others."""
    rng = random.Random(seed)
    forgetting = Forgetting(rng.randrange(1, 150), rng.randrange(0, 70), rng.randrange(0, 40))
    manager = BlockManager(40, (forgetting,))
    bytes_: dict[tuple[int, int], object] = {}
    live: list[tuple[SequenceBlocks, list[object]]] = []

    def append(made: SequenceBlocks, marks: list[object], count: int) -> None:
        start = made.tokens
        try:
            copies = made.append(count)
        except CacheFullError:
            return
        for source, target in copies:
            bytes_.update({(target, i): bytes_.get((source, i)) for i in range(32)})
        for token in range(start, made.tokens):
            marks.append(object())
            bytes_[made.blocks[token // 32], token % 32] = marks[-1]

    def drop(made: SequenceBlocks, marks: list[object]) -> None:
        first, before = forgetting.sink_blocks + rng.choice((0, 0, 3)), list(made.blocks)
        count = rng.randint(0, max(0, made.tokens // 32 - first))
        if 32 * (first + count) > made.tokens:
            return

        def move(copies: list[tuple[int, int]], tables: list[list[int]]) -> None:
            (behind,) = tables
            for source, target in copies:
                bytes_.update({(target, i): bytes_.get((source, i)) for i in range(32)})
            kept = [b for b in behind if b != HOLE]
            assert behind == [HOLE] * (len(behind) - len(kept)) + kept
            for block in kept:
                for i in range(32):
                    bytes_[block, i] = ("moved", bytes_.get((block, i)))

        try:
            made.drop(first, count, move)
        except CacheFullError:
            return
        except DroppedTokensError:
            assert made.blocks == before
            return
        if count:
            marks[32 * first :] = [("moved", mark) for mark in marks[32 * (first + count) :]]

    for _ in range(200):
        action = rng.choice(("new", "append", "append", "append", "fork", "crop", "drop", "free", "forget", "forget"))
        if action == "new" or not live:
            live.append((SequenceBlocks(manager), []))
            append(*live[-1], rng.randrange(80))
            continue
        made, marks = live[at := rng.randrange(len(live))]
        if action == "append":
            append(made, marks, rng.randrange(90))
        elif action == "fork" and len(live) < 6:
            live.append((made.fork(), list(marks)))
        elif action == "drop":
            drop(made, marks)
        elif action == "crop":
            back = made.tokens - rng.choice((rng.randint(0, made.tokens), min(made.tokens, forgetting.spare)))
            try:
                made.crop(back)
                del marks[made.tokens :]
            except DroppedTokensError:
                assert any(made.blocks[b] == HOLE for b in seen_blocks(forgetting, back))
        elif action == "forget":
            (gone,) = made.forget()
            assert all(made.blocks[n] == HOLE for n in gone) and not made.forgettable
        elif action == "free":
            made.free()
            live.pop(at)
        for other, expected in live:
            for place in seen_blocks(forgetting, other.tokens):
                tokens = range(32 * place, min(32 * place + 32, other.tokens))
                assert [bytes_[other.blocks[place], t % 32] for t in tokens] == [expected[t] for t in tokens]
            assert [n for n, b in enumerate(other.blocks) if b == HOLE] == list(other.holes)
        held = Counter(b for other, _ in live for b in other.blocks if b != HOLE)
        assert manager.free_blocks == 40 - len(held) and all(manager.users(b) == n for b, n in held.items())
    for made, _ in live:
        made.free()
    assert manager.free_blocks == 40


# ---- prefix cache


def text(seed: int, blocks: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100) for _ in range(32 * blocks)]


def test_a_prefix_is_matched_by_its_end() -> None:
    """Blocks that are invisible to its last token may be missing."""
    manager = BlockManager(40, (Forgetting(window=70, sinks=4, spare=32),))
    cache, wanted = PrefixCache(manager), keys(text(0, 12), "", 12)
    made = read(manager, 12 * 32)
    for key, block in zip(wanted, made.blocks, strict=True):
        cache.put(key, block)
    assert len(cache) == made.held < 12
    (blocks,) = cache.match(wanted)
    assert blocks == [b if n in (0, 9, 10, 11) else HOLE for n, b in enumerate(made.blocks)]
    twin = SequenceBlocks(manager)
    twin.adopt([blocks])
    assert twin.tokens == 384 and twin.holes == range(1, 9) and twin.held == 4
    twin.append(40)
    assert twin.forget() and twin.blocks[9] == HOLE
    (longer,) = cache.match([*wanted, *keys(text(1, 2), "", 2)])
    assert len(longer) == 12
    assert len(cache.match(wanted[:10])[0]) == 1  # the end of the shorter one was dropped
    assert len(cache.match([keys(text(2, 1), "", 1)[0], *wanted[1:]])[0]) == 0


def test_blocks_in_use_stay_in_the_prefix_cache() -> None:
    manager = BlockManager(40, (Forgetting(window=64, sinks=4, spare=32),))
    cache, wanted = PrefixCache(manager), keys(text(0, 8), "", 8)
    made = SequenceBlocks(manager)
    made.append(8 * 32)
    for key, block in zip(wanted, made.blocks, strict=True):
        cache.put(key, block)
    twin = made.fork()
    twin.crop(4 * 32)
    (gone,) = made.forget()
    assert gone.start == 1 and gone.stop > 4
    cache.forget_unused(wanted[gone.start : gone.stop])
    assert cache.known(wanted[:4]) == 4 and wanted[gone.stop - 1] not in cache._blocks
    twin.free()
    made.free()
    cache.clear()
    assert manager.free_blocks == 40
