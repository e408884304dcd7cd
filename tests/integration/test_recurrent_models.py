"""Models with recurrent states, optimized: `generate`, caches, engines and saved prefixes equal Transformers' own results."""

from __future__ import annotations

import copy

import pytest
import torch

from deepseek_optimizer import PagedCache, SamplingParams, make_engine
from deepseek_optimizer.errors import CheckpointError, ConfigError, StateMissingError, UnsupportedModelError
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.integration.generation.saved_prefix import load_prefix, save_prefix
from support.models import assert_close_rows

from .conftest import BACKENDS, Pair, make_pair

CASES = ["lfm2-mixed", "qwen3_5_text-mixed"]
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 24, "min_new_tokens": 24}


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=CASES)
def pair(request, backend) -> Pair:
    """Shared by all tests: leave it as it is."""
    return make_pair(request.param, backend)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "beams", "drafts"])
def test_generate_equals_transformers(pair: Pair, options) -> None:
    ids = pair.ids(45)
    plain = {name: value for name, value in options.items() if name == "num_beams"}
    assert torch.equal(pair.fast.generate(ids, **GREEDY, **options), pair.plain.generate(ids, **GREEDY, **plain))


def test_rows_of_different_lengths(pair: Pair) -> None:
    ids, mask = pair.ids(20, 13), pair.mask(20, 13)
    expected = pair.plain.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(pair.fast.generate(ids, attention_mask=mask, **GREEDY), expected)


def test_assisted_generation_rolls_states_back(pair: Pair) -> None:
    if pair.plain.config.model_type != "lfm2":
        pytest.skip("Transformers refuses assisted generation with this family")
    ids, assistant = pair.ids(30), copy.deepcopy(pair.plain)
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.1 * torch.randn_like(assistant.lm_head.weight))  # so that it is sometimes wrong
    expected = pair.plain.generate(ids, **GREEDY)
    assert torch.equal(pair.fast.generate(ids, assistant_model=assistant, **GREEDY), expected)


def test_copies_of_a_cache_continue_by_themselves(pair: Pair) -> None:
    ids, cache = pair.ids(40), PagedCache(pair.fast)
    with torch.no_grad():
        pair.fast(ids, cache=cache)
        twin = copy.deepcopy(cache)
        for tokens, own in (([3, 4], cache), ([5, 6], twin)):
            for token in tokens:
                logits = pair.fast(torch.tensor([[token]]), cache=own).logits[0]
            whole = torch.cat((ids, torch.tensor([tokens])), 1)
            assert_close_rows(logits, pair.plain(whole, use_cache=False).logits[0, -1:])


def test_a_cache_cannot_be_cropped_to_states_that_are_gone(pair: Pair) -> None:
    cache = PagedCache(pair.fast)
    with torch.no_grad():
        pair.fast(pair.ids(40), cache=cache)
    with pytest.raises(StateMissingError, match="cropped to 39 tokens"):
        cache.crop(-1)
    assert cache.get_seq_length() == 40
    cache.reset()
    assert pair.fast.dso.arena.manager.slots.high_water == 0


def test_packed_documents_run_transformers_own_forward(pair: Pair) -> None:
    """Its recurrent layers pass states from one document to the next, and so must these."""
    ids, positions = pair.ids(20), torch.tensor([[*range(12), *range(8)]])
    fast = copy.deepcopy(pair.fast)
    with torch.no_grad(), pytest.warns(OptimizerWarning, match="several documents"):
        logits = fast(ids, position_ids=positions, use_cache=False).logits[0]
    assert_close_rows(logits, pair.plain(ids, position_ids=positions, use_cache=False).logits[0])


def engine_of(pair: Pair):
    runtime = pair.fast.dso
    return make_engine(pair.fast, None, arena=runtime.new_arena(1 << 22), drafts=False), runtime


def test_an_engine_continues_a_conversation_and_another_process_does(pair: Pair, tmp_path) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    prompt = pair.ids(70)[0].tolist()
    first, runtime = engine_of(pair)
    [answer] = first.generate([prompt], sampling)
    expected = pair.plain.generate(torch.tensor([prompt]), **{**GREEDY, "max_new_tokens": 20, "min_new_tokens": 20})
    assert answer.token_ids == expected[0, 70:].tolist()
    text = [*prompt, *answer.token_ids, 7, 8, 9]
    [second] = first.generate([text], sampling)
    assert second.cached_tokens == 89  # the last token of the answer was not processed
    assert save_prefix(tmp_path / "a", runtime, first.core.memory, first.core.prefix, text) == 64
    other, runtime = engine_of(pair)
    assert load_prefix(tmp_path / "a", runtime, other.core.memory, other.core.prefix, text) == 64
    [again] = other.generate([text], sampling)
    assert again.cached_tokens == 64 and again.token_ids == second.token_ids
    data = bytearray((tmp_path / "a").read_bytes())
    data[-5] ^= 4
    (tmp_path / "a").write_bytes(data)
    other, runtime = engine_of(pair)
    with pytest.raises(CheckpointError, match="damaged states"):
        load_prefix(tmp_path / "a", runtime, other.core.memory, other.core.prefix)
    assert len(other.core.prefix) == 0


def test_a_window_of_the_cache_is_refused(pair: Pair) -> None:
    with pytest.raises((UnsupportedModelError, ConfigError), match="recurrent layers"):
        make_engine(pair.fast, None, cache_window=256)
