"""PagedCache: a Transformers Cache over blocks, with padding, copy on write, and blocks that are returned."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from transformers import Cache, DynamicCache

from deepseek_optimizer import CacheFullError, ConfigError, PagedCache
from deepseek_optimizer.cache import SequenceBlocks
from deepseek_optimizer.integration.compat import cache_name
from deepseek_optimizer.integration.memory.arena import Arena

from ..conftest import make_pair


@pytest.fixture
def filled(fresh_pair):
    """A cache of two sequences of 40 tokens, the same as a Transformers cache, and both models."""
    ids = fresh_pair.ids(40, 40)
    paged, dynamic = PagedCache(fresh_pair.fast), DynamicCache()
    with torch.no_grad():
        fresh_pair.fast(ids, cache=paged)
        fresh_pair.plain(ids, **{cache_name(): dynamic})
    return fresh_pair, paged, dynamic


def assert_same_future(pair, paged, dynamic, tokens=3):
    """Both caches give the same logits for the next tokens, and have the same keys and values."""
    assert paged.get_seq_length() == dynamic.get_seq_length()
    for i, layer in enumerate(dynamic.layers):
        torch.testing.assert_close(paged.layers[i].keys, layer.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(paged.layers[i].values, layer.values, atol=1e-4, rtol=1e-4)
    ids = pair.ids(*[tokens] * dynamic.layers[0].keys.shape[0], seed=5)
    with torch.no_grad():
        a = pair.fast(ids, cache=paged).logits
        b = pair.plain(ids, **{cache_name(): dynamic}).logits
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_it_is_a_transformers_cache(filled):
    pair, paged, dynamic = filled
    assert isinstance(paged, Cache)
    assert paged.batch_size == 2
    assert len(paged) == len(dynamic)
    assert paged.get_mask_sizes(4, 0) == dynamic.get_mask_sizes(4, 0)
    assert paged.get_max_length() == -1
    assert paged.is_croppable
    assert not paged.is_compileable
    assert paged.is_sliding == [False] * 3
    assert paged.is_initialized
    assert_same_future(pair, paged, dynamic)


@pytest.mark.parametrize("n", [0, -1, -8, -9, -39])
def test_crop(filled, n):
    pair, paged, dynamic = filled
    paged.crop(n)
    dynamic.crop(n)
    assert_same_future(pair, paged, dynamic)


def test_crop_to_a_length_and_beyond(filled):
    pair, paged, dynamic = filled
    paged.crop(33)
    dynamic.crop(-7)
    assert_same_future(pair, paged, dynamic)
    paged.crop(1000)
    assert paged.get_seq_length() == 36
    paged.crop(-1000)
    assert paged.get_seq_length() == 0


@pytest.mark.parametrize("order", [[1, 0], [0, 0], [1, 1]])
def test_reorder(filled, order):
    pair, paged, dynamic = filled
    for cache in (paged, dynamic):
        cache.reorder_cache(torch.tensor(order))
    assert_same_future(pair, paged, dynamic)
    assert_same_future(pair, paged, dynamic)


def test_repeat_and_select(filled):
    pair, paged, dynamic = filled
    for cache in (paged, dynamic):
        cache.batch_repeat_interleave(3)
    assert_same_future(pair, paged, dynamic)
    for cache in (paged, dynamic):
        cache.batch_select_indices(torch.tensor([5, 0, 2]))
    assert_same_future(pair, paged, dynamic)
    paged.batch_select_indices(torch.tensor([True, False, True]))
    assert paged.batch_size == 2


def test_shared_blocks_are_copied_before_a_write(filled):
    """After a fork the two write different tokens into the same partial block."""
    pair, paged, _ = filled
    twin = copy.deepcopy(paged)
    used = pair.fast.dso.arena.used_bytes
    with torch.no_grad():
        for cache, seed in ((paged, 1), (twin, 2)):
            pair.fast(pair.ids(5, 5, seed=seed), cache=cache)
        assert pair.fast.dso.arena.used_bytes > used
        for cache, seed in ((paged, 1), (twin, 2)):
            alone = DynamicCache()
            pair.plain(torch.cat([pair.ids(40, 40), pair.ids(5, 5, seed=seed)], 1), **{cache_name(): alone})
            assert_same_future(pair, cache, alone)


def test_reset(filled):
    pair, paged, dynamic = filled
    paged.reset()
    assert paged.get_seq_length() == 0
    assert pair.fast.dso.arena.used_bytes == 0
    dynamic = DynamicCache()
    with torch.no_grad():
        pair.fast(pair.ids(7), cache=paged)
        pair.plain(pair.ids(7), **{cache_name(): dynamic})
    assert_same_future(pair, paged, dynamic)


def test_padding_reads_as_zero_and_crops_by_columns(fresh_pair):
    ids, mask = fresh_pair.ids(40, 9), fresh_pair.mask(40, 9)
    cache = PagedCache(fresh_pair.fast)
    with torch.no_grad():
        fresh_pair.fast(ids, attention_mask=mask, cache=cache)
    assert [s.tokens for s in cache.state.sequences] == [40, 9]
    assert not cache.layers[0].keys[1, :, :31].any()
    assert cache.layers[0].keys[1, :, 31:].any()
    cache.crop(-4)
    assert [s.tokens for s in cache.state.sequences] == [36, 5]
    cache.reorder_cache(torch.tensor([1, 1]))
    assert [s.tokens for s in cache.state.sequences] == [5, 5]
    cache.crop(-6)
    assert [s.tokens for s in cache.state.sequences] == [0, 0]


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8", "int4"])
@torch.no_grad()
def test_storage(kv):
    pair = make_pair(kv_cache=kv)
    ids = pair.ids(50)
    error = (pair.fast(ids).logits - pair.plain(ids).logits).abs().max() / pair.plain(ids).logits.abs().max()
    assert error < {"fp32": 1e-4, "bf16": 2e-2, "int8": 5e-2, "int4": 0.5}[kv]
    assert pair.fast.dso.kv_dtype == kv


def test_blocks_are_freed_when_a_cache_is_deleted(fresh_pair):
    arena = fresh_pair.fast.dso.arena
    gc.collect()
    gc.disable()
    try:
        cache = PagedCache(fresh_pair.fast)
        with torch.no_grad():
            fresh_pair.fast(fresh_pair.ids(40), cache=cache)
        assert arena.used_bytes > 0
        del cache
        assert arena.used_bytes == 0
    finally:
        gc.enable()


def test_memory_is_freed_with_the_last_user(fresh_pair, monkeypatch):
    arena, released = fresh_pair.fast.dso.arena, []
    monkeypatch.setattr(arena.store, "release", released.append)
    first, second = PagedCache(fresh_pair.fast), PagedCache(fresh_pair.fast)
    with torch.no_grad():
        for cache in (first, second):
            fresh_pair.fast(fresh_pair.ids(4), cache=cache)
    del first, cache
    assert released == []
    del second
    assert released == [0]


@torch.no_grad()
def test_a_full_cache_is_an_error_and_recovers():
    pair = make_pair(kv_cache_memory=1 << 17)
    blocks = pair.fast.dso.arena.manager.num_blocks
    too_long = pair.ids(32 * blocks + 1)
    with pytest.raises(CacheFullError, match="more block"):
        pair.fast(too_long)
    cache = PagedCache(pair.fast)
    pair.fast(too_long[:, :-1], cache=cache)
    with pytest.raises(CacheFullError):
        pair.fast(too_long[:, -1:], cache=cache)
    assert cache.get_seq_length() == 32 * blocks
    with pytest.raises(CacheFullError):
        pair.fast.generate(pair.ids(4), max_new_tokens=4)
    del cache
    out = pair.fast.generate(pair.ids(4), max_new_tokens=4, do_sample=False)
    assert torch.equal(out, pair.plain.generate(pair.ids(4), max_new_tokens=4, do_sample=False))


@torch.no_grad()
def test_a_wrong_batch_size_is_rejected(filled):
    pair, paged, _ = filled
    with pytest.raises(ValueError, match="has 2 sequences, but the call has 3 rows"):
        pair.fast(pair.ids(1, 1, 1), cache=paged)


def test_a_model_that_is_not_optimized(fresh_pair):
    with pytest.raises(ConfigError, match="not an optimized model"):
        PagedCache(fresh_pair.plain)


class _Store:
    """A store that only counts calls."""

    num_blocks, block_bytes, num_states = 64, 1, 0

    def copy_block(self, source, target): ...

    def release(self, from_block): ...


def test_reclaim_during_an_allocation_waits():
    """A finaliser may run in the same thread while the manager is working, and must not modify it then."""
    arena = Arena(_Store(), layers=1)
    with arena.locked() as manager:
        sequence = SequenceBlocks(manager)
        sequence.append(40)
        arena.reclaim([sequence])
        assert manager.free_blocks == 62
    assert arena.manager.free_blocks == 64


def test_many_threads_leak_no_block():
    arena = Arena(_Store(), layers=1)

    def work():
        for count in range(1, 200):
            sequence = None
            with arena.locked() as manager:
                sequence = SequenceBlocks(manager)
                sequence.append(count % 90 + 1)
            arena.reclaim([sequence])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with arena.locked() as manager:
        assert manager.free_blocks == 64


def test_reclaim_during_a_step_frees_memory_after_it():
    class Plan:
        def run(self, batch, store):
            arena.reclaim([sequence])  # like the garbage collector
            return "done"

    class Store(_Store):
        released = ()

        def release(self, from_block):
            self.released += (from_block,)

    arena = Arena(Store(), layers=1)
    with arena.locked() as manager:
        sequence = SequenceBlocks(manager)
        sequence.append(5)
    assert arena.run(Plan(), None) == "done"
    assert arena.manager.free_blocks == 64
    assert arena.store.released == (0,)
