"""Int4 caches through engines and generate: the int8 copies of the newest tokens are released, shared, cropped and moved with
the tokens, and nothing depends on when."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer, PagedCache, SamplingParams, make_engine
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.cache import HOLE
from deepseek_optimizer.errors import DroppedTokensError
from support.family_configs import llama
from support.models import random_ids, random_model

from .conftest import BACKENDS

backends = pytest.mark.parametrize("backend", BACKENDS)
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=3)


def optimized(plain: Any, backend: str, *, release: bool = True, **fields: Any) -> Any:
    """An optimized copy that releases copies of tokens at once, without spare ones, or never."""
    fast = copy.deepcopy(plain)
    config = DeepSeekConfig(**{"precision": "fp32", "backend": backend, "kv_cache": "int4", **fields})
    DynamicGraphOptimizer(fast, config=config, batch_size_range=(1, 4)).optimize()
    set_release(fast.dso.arena.manager, release)
    return fast


def set_release(manager: Any, release: bool) -> None:
    assert manager.groups[0] is None and all(f.copies for f in manager.groups[1:]) and len(manager.groups) == 3
    manager.groups = tuple(replace(f, spare=0) if f is not None and release else None for f in manager.groups)


def engine_of(model: Any, blocks: int = 300, release: bool = True, **options: Any) -> Any:
    arena = model.dso.new_arena(blocks * model.dso.arena.store.block_bytes)
    with arena.locked() as manager:
        set_release(manager, release)
    return make_engine(model, None, arena=arena, **{"drafts": False, **options})


@pytest.fixture(scope="module")
def model() -> Any:
    """Models with 2 layers, by backend; do not modify them."""
    models: dict[str, Any] = {}

    def get(backend: str) -> Any:
        if backend not in models:
            models[backend] = optimized(random_model(llama(num_hidden_layers=2)), backend)
        return models[backend]

    return get


@backends
def test_engines_give_the_same_text_whenever_copies_are_released(backend: str, model: Any) -> None:
    """With prefixes that end within and at the end of another text, several requests at once, and preemptions."""
    fast = model(backend)
    document = random_ids(fast.config, 400)
    prompts = [document + random_ids(fast.config, 20, 1), document[:130] + [7] * 9, document + random_ids(fast.config, 9, 2)]
    reference = engine_of(fast, release=False, prefix_cache=False)
    expected = [reference.generate([prompt], GREEDY)[0] for prompt in prompts]
    engine = engine_of(fast)
    for prompt, wanted, cached in zip(prompts, expected, (0, 128, 384), strict=True):
        (actual,) = engine.generate([prompt], GREEDY)
        assert actual.token_ids == wanted.token_ids and actual.cached_tokens == cached
        assert backend != "cpu" or actual.logprobs == wanted.logprobs  # the reference's bits depend on the steps
    crowded = engine_of(fast, blocks=45, prefix_cache=False)
    answers = crowded.generate(prompts, GREEDY)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]


@pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")
def test_a_cache_window(model: Any) -> None:
    """Copies are released although the blocks of layers are not, and are moved with the tokens."""
    fast = model("cpu")
    prompt = random_ids(fast.config, 250)
    long = replace(GREEDY, max_tokens=300, logprobs=None)
    engines = [engine_of(fast, release=release, cache_window=256, sinks=4) for release in (True, False)]
    answers = [engine.generate([prompt], long)[0] for engine in engines]
    assert answers[0].token_ids == answers[1].token_ids and answers[0].dropped_tokens > 100


@backends
def test_a_cache_is_cropped_and_copied(backend: str, model: Any) -> None:
    fast = model(backend)
    ids = torch.tensor([random_ids(fast.config, 300)])
    cache = PagedCache(fast)
    fast(ids[:, :280], past_key_values=cache)
    cache.state.forget()
    tables = cache.state.sequences[0].tables
    assert HOLE not in tables[0].blocks and all(table.blocks[:4] == [HOLE] * 4 for table in tables[1:])
    with pytest.raises(DroppedTokensError, match="from 280 tokens to 100"):
        cache.crop(100)
    for twin in (copy.deepcopy(cache), cache):
        twin.crop(270)
        fresh = PagedCache(fast)
        fast(ids[:, :270], past_key_values=fresh)
        logits = [fast(ids[:, 270:], past_key_values=own).logits for own in (twin, fresh)]
        assert torch.allclose(*logits, rtol=0, atol=0 if backend == "cpu" else 0.05)
