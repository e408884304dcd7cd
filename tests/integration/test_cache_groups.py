"""Models with full and windowed layers through generate and engines: the windowed layers' blocks are given back, and nothing
else changes."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from deepseek_optimizer import (
    DeepSeekConfig,
    DynamicGraphOptimizer,
    PagedCache,
    SamplingParams,
    make_engine,
)
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.cache import HOLE
from deepseek_optimizer.cache.forgetting import max_blocks
from deepseek_optimizer.errors import CheckpointError, DroppedTokensError
from deepseek_optimizer.integration.compat import cache_name
from deepseek_optimizer.integration.generation.saved_prefix import load_prefix, save_prefix
from support.family_configs import gemma2, gemma3_text
from support.models import assert_close_rows, random_ids, random_model, transformers_logits

from .conftest import BACKENDS, Pair

backends = pytest.mark.parametrize("backend", BACKENDS)
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=3)


def six_layers() -> Any:
    """Five windowed layers and a full one."""
    return gemma3_text(num_hidden_layers=6, sliding_window_pattern=6, sliding_window=37)


def optimized(plain: Any, backend: str, *, release: bool = True, **fields: Any) -> Any:
    """An optimized copy that releases blocks at once, without spare tokens, or never."""
    fast = copy.deepcopy(plain)
    config = DeepSeekConfig(**{"precision": "fp32", "backend": backend, **fields})
    DynamicGraphOptimizer(fast, config=config, batch_size_range=(1, 4)).optimize()
    set_release(fast.dso.arena.manager, release)
    return fast


def set_release(manager: Any, release: bool) -> None:
    assert None in manager.groups and any(manager.groups)
    manager.groups = tuple(replace(f, spare=0) if f is not None and release else None for f in manager.groups)


@pytest.fixture(scope="module")
def made() -> Any:
    """(model, one that releases, one that does not), shared; do not modify them."""
    models: dict[Any, tuple[Any, Any, Any]] = {}

    def get(backend: str, kv_cache: str = "auto") -> tuple[Any, Any, Any]:
        if (backend, kv_cache) not in models:
            plain = random_model(six_layers())
            both = (optimized(plain, backend, release=release, kv_cache=kv_cache) for release in (True, False))
            models[backend, kv_cache] = (plain, *both)
        return models[backend, kv_cache]

    return get


def greedy(model: Any, ids: Any, count: int, **options: Any) -> Any:
    return model.generate(torch.as_tensor(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)


@backends
@pytest.mark.parametrize("kv_cache", ["auto", "bf16", "int8", "int4"])
def test_text_and_logits(backend: str, kv_cache: str, made: Any) -> None:
    """To the bit those of a cache that releases nothing, and, in fp32, Transformers'."""
    plain, fast, whole = made(backend, kv_cache)
    ids = torch.tensor([random_ids(fast.config, 200)])
    options = {"output_logits": True, "return_dict_in_generate": True}
    actual, expected = (greedy(model, ids, 50, **options) for model in (fast, whole))
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(torch.cat(actual.logits), torch.cat(expected.logits))
    cache = actual[cache_name()]
    assert all(HOLE in table.blocks for table in cache.state.sequences[0].tables[1:])
    if kv_cache == "auto":
        logits = transformers_logits(plain, actual.sequences[0].tolist())
        assert_close_rows(torch.cat(actual.logits), logits[199:-1], 3e-4)


@backends
def test_batches_beams_and_drafts(backend: str, made: Any) -> None:
    _, fast, whole = made(backend)
    lengths = (150, 41, 110)
    pair = Pair(whole, fast)
    ids, mask = pair.ids(*lengths), pair.mask(*lengths)
    texts = [greedy(model, ids, 30, attention_mask=mask).tolist() for model in (fast, whole)]
    assert texts[0] == texts[1]
    again = pair.ids(30).repeat(1, 4)
    for options in (
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 9},
        {"prompt_lookup_num_tokens": 9, "output_hidden_states": True},  # Transformers' loop
    ):
        texts = [greedy(model, again, 25, **options).tolist() for model in (fast, whole)]
        assert texts[0] == texts[1], options
    assert fast.dso.arena.used_bytes == 0


@backends
def test_a_cache_is_continued_cropped_and_read(backend: str, made: Any) -> None:
    """Cropping further back than the released blocks allow is an error that says what is possible; nothing changes."""
    _, fast, whole = made(backend)
    ids = torch.tensor([random_ids(fast.config, 260)])
    cache, other = PagedCache(fast), PagedCache(whole)
    for begin, end in ((0, 100), (100, 220)):
        fast(ids[:, begin:end], past_key_values=cache)
        whole(ids[:, begin:end], past_key_values=other)
    cache.state.forget()
    for layer, expected in zip(cache.layers, other.layers, strict=True):
        released = cache.state.sequences[0].tables[cache.state.arena.group_of(layer.index)].holes
        for actual, wanted in ((layer.keys, expected.keys), (layer.values, expected.values)):
            gone = slice(32 * released.start, 32 * released.stop)
            assert not actual[:, :, gone].any() and torch.equal(actual[:, :, gone.stop :], wanted[:, :, gone.stop :])
        assert bool(released) == (layer.index != 5)
    with pytest.raises(DroppedTokensError, match="from 220 tokens to 100.*Crop it to 0 tokens") as raised:
        cache.crop(100)
    assert raised.value.nearest == 0 and cache.get_seq_length() == 220
    twin = copy.deepcopy(cache)
    for one, reference in ((cache, copy.deepcopy(other)), (twin, other)):
        one.crop(210)
        reference.crop(210)
        logits = [m(ids[:, 210:], past_key_values=c).logits for m, c in ((fast, one), (whole, reference))]
        assert torch.equal(*logits)
    cache.crop(-cache.get_seq_length())
    logits = [m(ids[:, :50], past_key_values=c).logits for m, c in ((fast, cache), (whole, PagedCache(whole)))]
    assert torch.equal(*logits)


@backends
def test_memory_of_a_long_text(backend: str, made: Any) -> None:
    """2,000 tokens in about a third of the blocks that all layers would need."""
    _, fast, _ = made(backend)
    arena, graph = fast.dso.arena, fast.dso.graph
    groups, step = arena.manager.groups, fast.dso.config.prefill_chunk
    gc.collect()  # caches of other tests that are parts of reference cycles
    assert graph.cache.layer_groups == (1, 2, 3, 4, 5, 0)
    cache = PagedCache(fast)
    ids = torch.tensor([random_ids(fast.config, 2_000)])
    fast(ids, past_key_values=cache, logits_to_keep=1)
    cache.state.forget()
    held = cache.state.sequences[0].held
    assert held == 63 + 5 * 2 and arena.used_bytes == held * arena.store.block_bytes
    assert held <= max_blocks(groups, 2_000, step) < 6 * 63
    full = fast.dso.full_batch(3, 2_000, 64)
    spare = copy.deepcopy(fast).dso.arena.manager.groups
    assert full.bytes == 3 * (max_blocks(spare, 2_000, 64) + 6) * arena.store.block_bytes
    report = fast.dso.report()
    assert report.kv_token_bytes == 6 * report.kv_block_bytes // 32
    assert "as trained in 5 layers; their cache drops the rest" in str(report)


def engine_of(model: Any, blocks: int = 400, **options: Any) -> Any:
    arena = model.dso.new_arena(blocks * model.dso.arena.store.block_bytes)
    with arena.locked() as manager:
        set_release(manager, model.dso.arena.manager.groups.count(None) == 1)
    return make_engine(model, None, arena=arena, **{"drafts": False, **options})


@backends
def test_an_engine_and_saved_prefixes(backend: str, made: Any, tmp_path: Any) -> None:
    """Answers equal those of a cache that releases nothing; another process continues from a file."""
    _, fast, whole = made(backend)
    document = random_ids(fast.config, 400)
    prompts = [document + random_ids(fast.config, 20, seed) for seed in (1, 2)] + [document[:130] + [7] * 9]
    engine, reference = engine_of(fast), engine_of(whole)
    for prompt in prompts:
        (actual,), (expected,) = engine.generate([prompt], GREEDY), reference.generate([prompt], GREEDY)
        assert actual.token_ids == expected.token_ids and actual.logprobs == expected.logprobs
        assert actual.cached_tokens == expected.cached_tokens
    together = zip(engine.generate(prompts, GREEDY), reference.generate(prompts, GREEDY), strict=True)
    assert all(actual.token_ids == expected.token_ids for actual, expected in together)

    path = tmp_path / "prefix"
    tokens = save_prefix(path, fast.dso, engine.core.memory, engine.core.prefix, prompts[0])
    assert tokens == 416
    whole_size = 13 * 6 * engine.core.memory.store.saved_bytes
    assert path.stat().st_size < 0.5 * whole_size
    second = engine_of(fast)
    assert load_prefix(path, fast.dso, second.core.memory, second.core.prefix, prompts[0]) == 416
    (actual,), (again,) = second.generate([prompts[0]], GREEDY), engine.generate([prompts[0]], GREEDY)
    assert actual.cached_tokens == again.cached_tokens == 416
    assert actual.token_ids == again.token_ids and actual.logprobs == again.logprobs
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        load_prefix(path, fast.dso, second.core.memory, second.core.prefix, prompts[0])


@pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")
def test_a_cache_window_and_a_draft_model() -> None:
    """A window in which blocks move, and a draft model whose cache is cropped further back than it can be."""
    plain = random_model(gemma2(num_hidden_layers=4, sliding_window=37))
    fast, whole = (optimized(plain, "cpu", release=release) for release in (True, False))
    prompt = random_ids(plain.config, 60)
    long = replace(GREEDY, max_tokens=400, logprobs=None)
    answers = [engine_of(m, cache_window=256, sinks=4).generate([prompt], long)[0] for m in (fast, whole)]
    assert answers[0].token_ids == answers[1].token_ids and answers[0].dropped_tokens > 100
    expected = [engine_of(whole).generate([prompt], replace(long, max_tokens=150))[0].token_ids]
    drafted = make_engine(whole, draft_model=fast).generate([prompt], replace(long, max_tokens=150))
    assert [answer.token_ids for answer in drafted] == expected
