"""An engine's prefix cache saved to a file and loaded into another engine: the same text bit for bit, without new prefill."""

from __future__ import annotations

import copy

import pytest
import torch

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer, SamplingParams, make_engine
from deepseek_optimizer.errors import CacheFullError, CheckpointError
from deepseek_optimizer.integration.generation.fingerprint import fingerprint
from deepseek_optimizer.integration.generation.saved_prefix import load_prefix, save_prefix
from support.family_configs import llama, rope
from support.models import CASES, random_ids, random_model

from ..conftest import BACKENDS

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=5)


def made(case: str, backend: str, blocks: int = 32, seed: int = 0, **fields):
    model = copy.deepcopy(random_model(CASES[case]()))
    if seed:
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)
    config = DeepSeekConfig(**{"precision": "fp32", "backend": backend, **fields})
    DynamicGraphOptimizer(model, config=config, batch_size_range=(1, 4)).optimize()
    runtime = model.dso
    size = runtime.backend.block_bytes(runtime.graph, runtime.kv_dtype)
    engine = make_engine(model, None, arena=runtime.new_arena(blocks * size), drafts=False)
    return engine, runtime


def saved(path, engine, runtime, tokens):
    return save_prefix(path, runtime, engine.core.memory, engine.core.prefix, tokens)


def loaded(path, engine, runtime, tokens=None):
    return load_prefix(path, runtime, engine.core.memory, engine.core.prefix, tokens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["llama-gqa", "deepseek_v3-groups"])
@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
def test_the_same_text_without_prefill(tmp_path, backend, case, kv_cache):
    prompt = random_ids(CASES[case](), 140)
    first, runtime = made(case, backend, kv_cache=kv_cache)
    [expected] = first.generate([prompt], GREEDY)
    assert saved(tmp_path / "a", first, runtime, prompt) == 128
    second, runtime = made(case, backend, kv_cache=kv_cache)
    assert loaded(tmp_path / "a", second, runtime, prompt) == 128
    [again] = first.generate([prompt], GREEDY)  # from the cache as well, so that prompts are split equally
    [actual] = second.generate([prompt], GREEDY)
    assert expected.cached_tokens == 0 and actual.cached_tokens == again.cached_tokens == 128
    assert actual.token_ids == again.token_ids and actual.logprobs == again.logprobs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "mode",
    [
        {"attention_optimization": "sparse", "attention_window": 32, "attention_budget": 160},
        {"attention_optimization": "sliding", "attention_window": 64},
    ],
    ids=lambda mode: mode["attention_optimization"],
)
def test_data_of_attention_modes_is_saved_too(tmp_path, backend, mode):
    prompt = random_ids(CASES["llama-gqa"](), 420)
    first, runtime = made("llama-gqa", backend, **mode)
    first.generate([prompt], GREEDY)
    tokens = saved(tmp_path / "a", first, runtime, prompt)
    assert tokens >= 384
    second, runtime = made("llama-gqa", backend, **mode)
    assert loaded(tmp_path / "a", second, runtime, prompt) == tokens
    [again], [actual] = first.generate([prompt], GREEDY), second.generate([prompt], GREEDY)
    assert (
        actual.cached_tokens == again.cached_tokens >= 384
        and actual.token_ids == again.token_ids
        and actual.logprobs == again.logprobs
    )


def test_other_models_settings_and_texts_are_rejected(tmp_path):
    prompt = random_ids(CASES["llama-gqa"](), 70)
    engine, runtime = made("llama-gqa", "reference")
    engine.generate([prompt], GREEDY)
    saved(tmp_path / "a", engine, runtime, prompt)
    for other, words in (
        (made("llama-gqa", "reference", seed=1), "another weights"),
        (made("llama-gqa", "reference", precision="bf16"), "weight format"),
        (made("llama-gqa", "reference", kv_cache="int8"), "KV cache format"),
        (made("llama-linear", "reference"), "another model"),
    ):
        with pytest.raises(CheckpointError, match=words):
            loaded(tmp_path / "a", *other)
        assert len(other[0].core.prefix) == 0
    engine, runtime = made("llama-gqa", "reference")
    with pytest.raises(CheckpointError, match="another text"):
        loaded(tmp_path / "a", engine, runtime, [prompt[0] + 1, *prompt[1:]])
    with pytest.raises(CheckpointError, match="another text"):
        loaded(tmp_path / "a", engine, runtime, prompt[:40])


def test_a_damaged_block_leaks_no_block(tmp_path):
    prompt = random_ids(CASES["llama-gqa"](), 140)
    engine, runtime = made("llama-gqa", "reference")
    engine.generate([prompt], GREEDY)
    saved(tmp_path / "a", engine, runtime, prompt)
    data = bytearray((tmp_path / "a").read_bytes())
    data[-5] ^= 4
    (tmp_path / "a").write_bytes(data)
    other, runtime = made("llama-gqa", "reference")
    with pytest.raises(CheckpointError, match="block 3 is damaged"):
        loaded(tmp_path / "a", other, runtime, prompt)
    assert len(other.core.prefix) == 0 and other.core.memory.manager.free_blocks == 32


def test_too_small_caches_are_errors_and_full_ones_evict(tmp_path):
    prompt = random_ids(CASES["llama-gqa"](), 140)
    engine, runtime = made("llama-gqa", "reference")
    engine.generate([prompt], GREEDY)
    saved(tmp_path / "a", engine, runtime, prompt)
    small, runtime = made("llama-gqa", "reference", blocks=3)
    with pytest.raises(CacheFullError):
        loaded(tmp_path / "a", small, runtime)
    full, runtime = made("llama-gqa", "reference", blocks=6)
    full.generate([random_ids(CASES["llama-gqa"](), 150, seed=9)], GREEDY)
    assert loaded(tmp_path / "a", full, runtime) == 128
    assert full.generate([prompt], GREEDY)[0].cached_tokens == 128


def test_an_empty_cache_writes_no_file(tmp_path):
    engine, runtime = made("llama-gqa", "reference")
    assert saved(tmp_path / "a", engine, runtime, random_ids(CASES["llama-gqa"](), 70)) == 0
    assert list(tmp_path.iterdir()) == []


def test_fingerprints_are_the_same_in_another_copy():
    assert fingerprint(made("deepseek_v3-groups", "reference")[1]) == fingerprint(made("deepseek_v3-groups", "reference")[1])


def test_growing_frequencies_are_distinguished():
    """The parameters of the frequencies are part of the fingerprint."""
    case, other = rope("dynamic", factor=4.0), rope("dynamic", factor=4.0, rope_theta=20000.0)
    actual = []
    for parameters in (case, case, other):
        model = random_model(llama(max_position_embeddings=256, **parameters))
        config = DeepSeekConfig(precision="fp32", backend="reference")
        DynamicGraphOptimizer(model, config=config).optimize()
        actual.append(fingerprint(model.dso))
    assert actual[0] == actual[1] and actual[0]["model"] != actual[2]["model"]
