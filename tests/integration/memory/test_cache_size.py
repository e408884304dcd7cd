"""The maximum size of caches, the settings for it, and that caches stop where memory ends."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer import CacheFullError, NotEnoughMemoryError, PagedCache, load_model, make_engine
from deepseek_optimizer.backends import cpu
from deepseek_optimizer.cache import SequenceBlocks
from deepseek_optimizer.engine.request import SamplingParams
from deepseek_optimizer.integration.memory import cache_size, growth
from deepseek_optimizer.integration.memory.arena import Arena
from deepseek_optimizer.integration.memory.growth import STEP, CheckedGrowth
from deepseek_optimizer.system import memory
from deepseek_optimizer.system.memory import RESERVE_BYTES, Limit
from support.memory import memory_of
from support.models import random_ids

from ..conftest import make_pair

GB = 1_000_000_000
CGROUP = Limit("cgroup", "the cgroup /slice/x", "memory", 4_096_000_000, 1_200_000_000)


def batch_of(block_bytes, free, sequences=16, beside=0):
    batch = cache_size.FullBatch(sequences, 8192, sequences * 257 * block_bytes)
    return cache_size.for_batch(batch, free, beside)


def test_the_size_of_a_full_batch():
    size = batch_of(100_000, memory_of(9 * GB))
    assert size.bytes == 16 * 257 * 100_000
    words = "grows to at most 411 MB (16 sequences of 8,192 tokens; half of the 9,000 MB that are free would be 4,500 MB)"
    assert str(size) == words


def test_half_of_the_free_memory():
    size = batch_of(10_000_000, memory_of(9 * GB))
    words = "grows to at most 4,500 MB (half of the 9,000 MB that are free; 16 sequences of 8,192 tokens would take 41,120 MB)"
    assert str(size) == words
    words = str(batch_of(10_000_000, memory_of(9 * GB, CGROUP), sequences=1))
    assert "(half of the 1,200 MB that the cgroup /slice/x leaves free; 1 sequence of 8,192 tokens would take" in words


def test_two_models_share_the_half():
    first, second = (
        batch_of(bytes, memory_of(9 * GB), beside=16 * 257 * other) for bytes, other in ((30**5, 10**7), (10**7, 30**5))
    )
    assert 0 <= 4_500_000_000 - first.bytes - second.bytes < 2 and "that are free, shared with another model's;" in str(first)


def test_slots_for_recurrent_states_take_a_part():
    size = cache_size.granted(10_000)
    assert size.slots(0) == 0 and size.slots(10) == 300 and size.slots(2_000) == cache_size.SLOTS_PER_SEQUENCE
    with pytest.raises(NotEnoughMemoryError, match="recurrent states of a sequence.*kv_cache_memory"):
        size.slots(3_000)


@pytest.mark.parametrize("free", [9 * GB, 1 * GB])
@pytest.mark.parametrize("state_bytes", [50_000_000, 333])
def test_a_full_batch_shares_the_memory_as_it_needs(free, state_bytes):
    """Neither states nor blocks run out first."""
    states, blocks = 16 * 4 * state_bytes, 16 * 257 * 100_000
    batch = cache_size.FullBatch(16, 8192, blocks + states, states)
    size = cache_size.for_batch(batch, memory_of(free))
    share = min(1.0, size.bytes / batch.bytes)
    assert size.slots(state_bytes) == pytest.approx(share * 64, abs=1)
    assert size.bytes - size.slots(state_bytes) * state_bytes == pytest.approx(share * blocks, abs=state_bytes + 1)


@pytest.mark.parametrize("blocks", [1, 10_000, 1_000_000])
@pytest.mark.parametrize("sequences", [1, 2, 9])
@pytest.mark.parametrize("state_bytes", [10, 3_000])
def test_the_size_to_grant_for_states_and_blocks(blocks, sequences, state_bytes):
    slots = sequences * cache_size.SLOTS_PER_SEQUENCE
    size = cache_size.granted(cache_size.with_states(blocks, slots * state_bytes, sequences))
    assert size.slots(state_bytes) >= slots and size.bytes - size.slots(state_bytes) * state_bytes >= blocks
    assert cache_size.with_states(blocks, 0, sequences) == blocks


def test_explicit_limits_and_free_memory():
    assert cache_size.granted(10_500).blocks(1000) == 10 and cache_size.granted(10).blocks(1000) == 1
    assert str(cache_size.granted(2 * GB)) == "grows to at most 2,000 MB (kv_cache_memory)"
    assert str(cache_size.what_is_free(memory_of(9 * GB))) == (
        "grows to at most 8,100 MB (the 9,000 MB that are free, less a reserve)"
    )
    assert cache_size.what_is_free(memory_of(1)).blocks(1000) == 1


class _Store:
    """A store that only counts calls."""

    block_bytes = 1 << 20
    num_states = released = 0

    def __init__(self, blocks=1000):
        self.num_blocks = blocks

    def release(self, from_block):
        self.released += 1


class _Clock:
    now = 0.0

    def __call__(self):
        return self.now


def arena_in(machine, clock=None):
    """An arena on a machine `{"free": bytes}`."""
    store = _Store()
    grown = CheckedGrowth(store.block_bytes, store.num_blocks, lambda: memory_of(machine["free"]), clock=clock or _Clock())
    return Arena(store, layers=1, growth=grown)


def hold(arena, blocks):
    with arena.locked() as manager:
        sequence = SequenceBlocks(manager)
        sequence.append(32 * blocks)
    return sequence


def test_it_grows_in_steps_and_stops_before_the_reserve():
    step = STEP >> 20
    grown = CheckedGrowth(1 << 20, 1000, lambda: memory_of(RESERVE_BYTES + (100 << 20)))
    assert grown.grow(1, 0) == step and grown.grow(step + 1, step) == 2 * step
    assert grown.grow(100, 0) == 100 and grown.shortage is None
    assert grown.grow(101, 0) == 0 and grown.shortage.startswith("there is no memory for more: this machine has 373 MB")
    assert CheckedGrowth(1 << 20, 70, lambda: memory_of(GB)).grow(65, 64) == 70
    assert CheckedGrowth(1 << 20, 70, lambda: memory_of(0)).grow(1, 0) == 0


def test_blocks_that_have_memory_need_no_more():
    """A store on a device allocates all blocks at the first write: from then on nothing but the cache fills the card."""
    held = {"blocks": 0}
    grown = CheckedGrowth(1 << 20, 1000, lambda: memory_of(0 if held["blocks"] else 2 * GB), lambda: held["blocks"])
    assert grown.grow(1, 0) == STEP >> 20
    held["blocks"] = 1000
    assert grown.grow(65, 64) == 1000 and grown.shortage is None
    held["blocks"] = 100
    assert grown.grow(101, 64) == 100 and grown.shortage.startswith("there is no memory for more")


def test_reserved_address_space_can_be_used():
    spent = Limit("reserved", "ulimit -v", "address space", GB, 0)
    assert CheckedGrowth(1 << 20, 1000, lambda: memory_of(GB, spent)).grow(10, 0) >= 10


def test_other_processes_take_and_return_memory():
    machine, clock = {"free": GB}, _Clock()
    arena = arena_in(machine, clock)
    first = hold(arena, 64)
    machine["free"] = RESERVE_BYTES
    with pytest.raises(CacheFullError, match="there is no memory for more") as error:
        hold(arena, 1)
    assert "free memory" in str(error.value) and "raise kv_cache_memory" not in str(error.value)
    machine["free"] = GB
    with pytest.raises(CacheFullError):
        hold(arena, 1)
    clock.now = 1.0
    hold(arena, 1)
    assert first.blocks[0] == 0


def test_returned_memory_is_checked_again():
    machine = {"free": GB}
    arena = arena_in(machine)
    arena.reclaim([hold(arena, 10)])
    assert arena.store.released == 1
    machine["free"] = RESERVE_BYTES
    with pytest.raises(CacheFullError):
        hold(arena, 1)


@pytest.fixture
def free(monkeypatch):
    """free(bytes, *limits): sets the free memory that is reported from now on."""

    def becomes(size, *limits):
        for module in (memory, cpu):
            monkeypatch.setattr(module, "free_memory", lambda: memory_of(size, *limits))

    return becomes


@pytest.fixture
def folder(tmp_path):
    pair = make_pair()
    pair.plain.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_an_engine_has_a_full_batch_of_the_models_context(folder, free):
    free(20 * GB)
    model = load_model(folder, backend="reference")
    engine = make_engine(model, batch_size_range=(1, 3))
    context = model.config.max_position_embeddings
    assert engine.core.blocks == 3 * (context // 32 + 1)
    assert str(engine.core.memory.size).endswith(
        f"(3 sequences of {context:,} tokens; half of the 20,000 MB that are free would be 10,000 MB)"
    )
    assert model.dso.arena is engine.core.memory
    report = model.report()
    assert report.kv_limit == engine.core.memory.size.bytes and "3 sequences" in str(report)


def test_a_draft_model_has_a_share_of_the_half(folder, free):
    free(4 * 1_000_000)
    models = [load_model(folder, backend="reference") for _ in range(2)]
    make_engine(models[0], draft_model=models[1])
    assert [model.dso.arena.size.bytes for model in models] == [1_000_000] * 2


def test_a_full_batch_runs_at_once(folder, monkeypatch):
    """The whole context for all sequences at once, within the reported size."""
    model = load_model(folder, backend="reference")
    engine = make_engine(model, batch_size_range=(1, 2), drafts=False)
    context, step, together = model.config.max_position_embeddings, engine.core.runner.step, []
    monkeypatch.setattr(
        engine.core.runner, "step", lambda parts, *args, **more: together.append(len(parts)) or step(parts, *args, **more)
    )
    prompts = [random_ids(model.config, context - 20, seed=n) for n in range(2)]
    actual = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    assert [len(answer.token_ids) for answer in actual] == [20, 20]
    assert engine.core.scheduler.preemptions == 0 and together.count(2) >= 18


def test_two_servers_share_the_memory_of_a_machine(folder, free):
    """Each reports at most half of the free memory."""
    free(4 * 1_000_000)
    sizes = [make_engine(load_model(folder, backend="reference")).core.memory.size for _ in range(2)]
    assert [size.bytes for size in sizes] == [2_000_000] * 2
    assert all(str(size).startswith("grows to at most 2 MB (half of the 4 MB that are free;") for size in sizes)


def test_two_engines_share_the_free_memory(folder, monkeypatch):
    """Memory used by one is not available to the other: its requests fail with a message, and the first continues."""
    monkeypatch.setattr(growth, "STEP", 1)
    models = [load_model(folder, backend="reference") for _ in range(2)]
    engines = first, second = [make_engine(model, prefix_cache=False) for model in models]
    block_bytes, blocks = models[0].report().kv_block_bytes, 6

    def machine():
        taken = sum(engine.core.memory.manager._backed for engine in engines)
        return memory_of(RESERVE_BYTES + (blocks - taken) * block_bytes)

    for engine in engines:
        engine.core.memory._growth._read = machine
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    short, long = (random_ids(models[0].config, tokens) for tokens in (40, 140))
    wanted = first.generate([short], greedy)[0].token_ids
    assert second.generate([short], greedy)[0].token_ids == wanted
    [answer] = second.generate([long], greedy)  # 5 blocks, but only 4 are left
    assert answer.finish == "error" and answer.error.startswith("there is no memory for more: this machine has 268 MB")
    assert [engine.generate([short], greedy)[0].token_ids for engine in engines] == [wanted] * 2
    blocks = 7
    second.core.memory.manager.lift_limit()  # as happens a second later
    assert len(second.generate([long], greedy)[0].token_ids) == 4


def test_a_server_cannot_request_more_than_is_free(folder, free):
    model = load_model(folder, backend="reference", kv_cache_memory=2 * GB)
    free(9 * GB, CGROUP)
    with pytest.raises(NotEnoughMemoryError, match=r"the cgroup /slice/x limits .*kv_cache_memory"):
        make_engine(model)
    free(9 * GB)
    assert make_engine(model).core.memory.size.bytes == 2 * GB


@torch.no_grad()
def test_the_address_space_limits_the_reservation(folder, free):
    model = load_model(folder, backend="reference")
    space = Limit("reserved", "ulimit -v", "address space", GB, 300_000_000)
    free(9 * GB, space)
    assert model.dso.arena.size.bytes == 300_000_000 - RESERVE_BYTES
    with pytest.raises(NotEnoughMemoryError, match="ulimit -v limits address space"):
        model.dso.new_arena(400_000_000)
    PagedCache(model)


def test_too_large_weights_are_rejected_before_reading(folder, free):
    needed = sum(p.nbytes for p in load_model(folder, backend="reference").parameters())
    free(needed - 1)
    with pytest.raises(NotEnoughMemoryError, match="the model's weights") as error:
        load_model(folder, backend="reference")
    assert error.value.needed == needed
    free(needed)
    load_model(folder, backend="reference")
