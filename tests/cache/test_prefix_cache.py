"""The prefix cache against a dictionary of whole texts, over a real block manager."""

import random

import pytest

from deepseek_optimizer.cache import BlockManager
from deepseek_optimizer.cache.block_manager import BLOCK_TOKENS
from deepseek_optimizer.cache.prefix_cache import PrefixCache, keys, partial_keys


def text(seed, blocks):
    rng = random.Random(seed)
    return [rng.randrange(100) for _ in range(blocks * BLOCK_TOKENS)]


def filled(manager, cache, tokens, salt=""):
    """Allocates blocks for a text, adds them to the cache, and frees them."""
    count = len(tokens) // BLOCK_TOKENS
    blocks = manager.allocate(count)
    for key, block in zip(keys(tokens, salt, count), blocks, strict=True):
        cache.put(key, block)
    for block in blocks:
        manager.release(block)
    return blocks


def test_the_longest_cached_prefix_is_returned():
    manager = BlockManager(20)
    cache = PrefixCache(manager)
    blocks = filled(manager, cache, text(1, 4))
    assert manager.free_blocks == 16 and cache.unused == 4
    wanted = keys([*text(1, 3), *text(2, 2)], "", 5)
    assert cache.known(wanted) == 3 and cache.match(wanted) == [blocks[:3]]
    assert [manager.users(b) for b in blocks] == [2, 2, 2, 1] and cache.unused == 1
    assert cache.match(keys(text(3, 2), "", 2)) == [[]]


def test_a_block_matches_only_with_its_whole_prefix():
    """The same tokens after another prefix are a different block."""
    manager = BlockManager(20)
    cache = PrefixCache(manager)
    filled(manager, cache, [*text(1, 1), *text(2, 1)])
    assert cache.match(keys([*text(3, 1), *text(2, 1)], "", 2)) == [[]] and cache.match(keys(text(2, 1), "", 1)) == [[]]


def test_salts_share_nothing():
    manager = BlockManager(20)
    cache = PrefixCache(manager)
    filled(manager, cache, text(1, 2), "a key")
    for salt in ("", "another", "a ke"):
        assert cache.known(keys(text(1, 2), salt, 2)) == 0
    assert cache.known(keys(text(1, 2), "a key", 2)) == 2


def test_least_recently_used_blocks_are_evicted_from_the_end():
    manager = BlockManager(20)
    cache = PrefixCache(manager)
    old, new = text(1, 2), text(2, 2)
    filled(manager, cache, old)
    filled(manager, cache, new)
    cache.touch(keys(new, "", 2))
    cache.touch(keys(old, "", 2))
    assert cache.evict(1) == 1 and cache.known(keys(new, "", 2)) == 1 and cache.known(keys(old, "", 2)) == 2
    assert cache.evict(2) == 2 and cache.known(keys(new, "", 2)) == 0 and cache.known(keys(old, "", 2)) == 1


def test_blocks_in_use_stay():
    manager = BlockManager(20)
    cache = PrefixCache(manager)
    filled(manager, cache, text(1, 3))
    (held,) = cache.match(keys(text(1, 3), "", 2))
    assert cache.evict(10) == 1 and all(manager.users(b) == 2 for b in held)
    cache.clear()
    assert all(manager.users(b) == 1 for b in held) and len(cache) == 0


def test_the_limit_is_respected():
    manager = BlockManager(20)
    cache = PrefixCache(manager, max_blocks=3)
    filled(manager, cache, text(1, 2))
    filled(manager, cache, text(2, 2))
    assert len(cache) == 3 and manager.free_blocks == 17
    (held,) = cache.match(keys(text(2, 2), "", 2))
    filled(manager, cache, text(3, 3))
    assert len(cache) == 3 and all(manager.users(b) == 2 for b in held)


@pytest.mark.parametrize("seed", range(5))
def test_at_random(seed):
    """No block leaks, and every match agrees with a dictionary of texts."""
    rng = random.Random(seed)
    manager = BlockManager(24)
    cache, holds, contents = PrefixCache(manager, max_blocks=rng.choice([None, 8])), [], {}
    for _ in range(400):
        action = rng.random()
        if action < 0.4:
            tokens = [t for n in range(rng.randrange(1, 5)) for t in text(rng.randrange(3) + 10 * n, 1)]
            wanted = keys(tokens, "", len(tokens) // BLOCK_TOKENS)
            (actual,) = cache.match(wanted)
            for n, block in enumerate(actual):
                assert contents[block] == tuple(tokens[: (n + 1) * BLOCK_TOKENS])
            missing = len(wanted) - len(actual)
            if missing > manager.free_blocks:
                cache.evict(missing - manager.free_blocks)
            if missing <= manager.free_blocks:
                new = manager.allocate(missing)
                for n, block in enumerate(new, len(actual)):
                    contents[block] = tuple(tokens[: (n + 1) * BLOCK_TOKENS])
                    cache.put(wanted[n], block)
                holds.append(actual + new)
            else:
                holds.append(actual)
        elif action < 0.8 and holds:
            for block in holds.pop(rng.randrange(len(holds))):
                manager.release(block)
        else:
            cache.evict(rng.randrange(3))
    for hold in holds:
        for block in hold:
            manager.release(block)
    assert manager.free_blocks + len(cache) == 24 and cache.unused == len(cache)
    cache.clear()
    assert manager.free_blocks == 24


def test_blocks_with_other_frequencies_do_not_match():
    tokens = text(1, 3)
    plain, one, other = (keys(tokens, "salt", 3, frequencies=n) for n in (0, 300, 301))
    assert plain == keys(tokens, "salt", 3)
    assert len({*plain, *one, *other}) == 9
    assert keys(tokens, "salt", 3, one[:1], frequencies=300) == one


def test_partly_filled_blocks_have_keys_of_their_own():
    words = text(1, 2)
    [_, second] = keys(words, "", 2)
    [first] = keys(words, "", 1)
    ends = partial_keys(words[32:63], 32, first)
    assert len(ends) == 31 and len({*ends, first, second}) == 33
    assert partial_keys(words[32:50], 32, first) == ends[13:]  # the fullest first
    assert set(ends).isdisjoint(partial_keys(words[32:63], 32, second)) and not partial_keys([], 32, first)


def test_a_partly_filled_block_is_taken_out():
    manager = BlockManager(20, slots=BlockManager(4))
    cache = PrefixCache(manager)
    ends = partial_keys(text(1, 1)[:20], 32, b"before")
    [block], [slot] = manager.allocate(1), manager.slots.allocate(1)
    cache.put(ends[3], block)
    assert cache.take_partial(ends) is None  # without its states
    cache.put_state(ends[3], slot)
    assert cache.take_partial(ends) is None  # its sequence still writes into it
    manager.release(block)
    assert cache.take_partial(ends) is None
    manager.slots.release(slot)
    assert cache.take_partial(ends[:3]) is None and cache.take_partial(ends) == (3, [block], slot)
    assert manager.users(block) == manager.slots.users(slot) == 1 and len(cache) == cache.unused_states == 0
    assert cache.take_partial(ends) is None


def test_a_partly_filled_block_is_evicted_with_its_states():
    manager = BlockManager(2, slots=BlockManager(2))
    cache = PrefixCache(manager)
    [block], [slot] = manager.allocate(1), manager.slots.allocate(1)
    [key] = partial_keys([1], 32, b"before")
    cache.put(key, block)
    cache.put_state(key, slot)
    manager.release(block)
    manager.slots.release(slot)
    assert cache.evict(1) == 1 and manager.free_blocks == manager.slots.free_blocks == 2
