"""The turns of a conversation in the engine: each reuses all tokens of the earlier ones, whatever the cache holds."""

from __future__ import annotations

import pytest

from deepseek_optimizer import SamplingParams, make_engine

from .conftest import BACKENDS, make_pair

CACHES = ["fp32", "int8", "int4"]  # int4: the newest tokens are read from int8 copies
CASES = [
    "llama-gqa",
    "gemma3_text-two-ropes",
    "deepseek_v3-groups",
    "deepseek_v32-indexer",
    "deepseek_v4-mixed",
    "qwen3_5_text-mixed",
]


@pytest.mark.parametrize("kv_dtype", CACHES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_turns_equal_those_without_a_prefix_cache(case, backend, kv_dtype) -> None:
    pair = make_pair(case, backend, kv_cache=kv_dtype)
    sampling = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, logprobs=1)
    engines = [make_engine(pair.fast, None, drafts=False, prefix_cache=cached) for cached in (True, False)]
    text = pair.ids(40)[0].tolist()
    for turn in range(4):
        cached, plain = (engine.generate([text], sampling)[0] for engine in engines)
        if kv_dtype == "fp32":
            assert cached.token_ids == plain.token_ids
        else:  # a prompt's tokens attend to each other before they are rounded, an answer's to rounded ones
            first, other = cached.logprobs[0], plain.logprobs[0]
            assert first.token == other.token and abs(first.logprob - other.logprob) < 0.02
        assert cached.cached_tokens == (len(text) - 14 if turn else 0)
        text = [*text, *cached.token_ids, *pair.ids(13, seed=turn + 1)[0].tolist()]
    for engine in engines:
        engine.close()
