"""Real models with `prefix_cache_dir`: another engine gives the same bits as one that has the prefix in memory."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer, SamplingParams, make_engine
from deepseek_optimizer.errors import ConfigError
from support.family_configs import gemma2
from support.models import CASES, random_ids, random_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=5)
MODELS = {
    "full": CASES["llama-gqa"],
    "latent": CASES["deepseek_v3-groups"],
    "windowed layers": lambda: gemma2(num_hidden_layers=4, sliding_window=37),
    "recurrent": CASES["qwen3_next-experts"],
}


def optimized(config: Any, backend: str = "cpu", **fields: Any) -> Any:
    model = copy.deepcopy(random_model(config))
    settings = DeepSeekConfig(**{"precision": "fp32", "backend": backend, **fields})
    DynamicGraphOptimizer(model, config=settings, batch_size_range=(1, 4)).optimize()
    return model


def engine_of(model: Any, directory: Path | None, **options: Any) -> Any:
    given = {} if directory is None else {"prefix_cache_dir": str(directory)}
    return make_engine(model, None, arena=model.dso.new_arena(1 << 23), **{"drafts": False, **given, **options})


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
def test_the_same_bits_after_a_restart(tmp_path, kind, kv_cache):
    config = MODELS[kind]()
    model, prompt = optimized(config, kv_cache=kv_cache), random_ids(config, 200)
    with engine_of(model, tmp_path) as first:
        [whole] = first.generate([prompt], GREEDY)
        [again] = first.generate([prompt], GREEDY)  # from memory
    with engine_of(optimized(config, kv_cache=kv_cache), tmp_path) as second:
        [actual] = second.generate([prompt], GREEDY)
    assert whole.cached_tokens == 0 and again.cached_tokens == actual.cached_tokens == 192
    assert actual.token_ids == again.token_ids and actual.logprobs == again.logprobs
    assert actual.token_ids == whole.token_ids


def test_what_decides_the_values_keeps_caches_apart(tmp_path):
    config = MODELS["full"]()
    model, prompt = optimized(config), random_ids(config, 100)
    with engine_of(model, tmp_path) as engine:
        engine.generate([prompt], GREEDY)
    changed = copy.deepcopy(random_model(config))
    matrix = next(p for name, p in changed.named_parameters() if p.ndim == 2 and "mlp" in name)
    with torch.no_grad():
        matrix.view(-1)[matrix.numel() // 2] += 1  # one element in its middle
    DynamicGraphOptimizer(changed, config=model.dso.config, batch_size_range=(1, 4)).optimize()
    for apart, options in (
        (changed, {}),
        (optimized(config, precision="bf16"), {}),
        (optimized(config, kv_cache="int8"), {}),
        (optimized(config, "reference"), {}),
        (optimized(config, attention_optimization="sliding", attention_window=64), {}),
        (model, {"batch_invariant": True}),
    ):
        with engine_of(apart, tmp_path, **options) as engine:
            assert engine.generate([prompt], GREEDY)[0].cached_tokens == 0
    with engine_of(copy.deepcopy(model), tmp_path) as engine:
        assert engine.generate([prompt], GREEDY)[0].cached_tokens == 96


def test_options_that_cannot_work(tmp_path):
    model = optimized(MODELS["full"]())
    with pytest.raises(ConfigError, match="prefix_cache=False"):
        engine_of(model, tmp_path, prefix_cache=False)
    with pytest.raises(ConfigError, match="prefix_cache_bytes must be at least"):
        engine_of(model, tmp_path, prefix_cache_bytes=1000)


_PROCESS = """
import sys
from deepseek_optimizer import SamplingParams, load_model, make_engine
with make_engine(load_model(sys.argv[1]), prefix_cache_dir=sys.argv[2]) as engine:
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    [answer] = engine.generate([[n % 250 for n in range(100)]], sampling)
    print(answer.cached_tokens, answer.token_ids)
"""


@pytest.mark.slow
def test_two_processes(tiny_model, tmp_path):
    def run() -> str:
        command = [sys.executable, "-c", _PROCESS, str(tiny_model), str(tmp_path)]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300).stdout

    first, second = run(), run()
    assert first.startswith("0 ") and second == first.replace("0 ", "96 ", 1)
