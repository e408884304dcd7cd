"""DeepSeek-V4, optimized: `generate`, caches, engines and packed directories equal Transformers' own results."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HCACache

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer, PagedCache, SamplingParams, load_model, make_engine
from deepseek_optimizer.errors import UnsupportedModelError, UnsupportedRequestError
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.integration.compat import take_cache
from deepseek_optimizer.integration.generation.saved_prefix import load_prefix, save_prefix
from support.models import CASES, assert_close_rows, random_model

from .conftest import BACKENDS, Pair, make_pair

GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 24, "min_new_tokens": 24}


@pytest.fixture(scope="module", params=BACKENDS)
def pair(request) -> Pair:
    """Shared by all tests: leave it as it is."""
    return make_pair("deepseek_v4-mixed", request.param)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "beams", "drafts"])
def test_generate_equals_transformers(pair: Pair, options) -> None:
    if "num_beams" in options and "reorder_cache" not in vars(DeepseekV4HCACache):
        pytest.skip("the cache of this release of Transformers does not reorder compressed entries with the beams")
    ids = pair.ids(45)
    plain = {name: value for name, value in options.items() if name == "num_beams"}
    assert torch.equal(pair.fast.generate(ids, **GREEDY, **options), pair.plain.generate(ids, **GREEDY, **plain))


def test_padded_rows_equal_rows_by_themselves(pair: Pair) -> None:
    """In Transformers, padding would be compressed with the text."""
    ids, mask = pair.ids(40, 33), pair.mask(40, 33)
    made = pair.fast.generate(ids, attention_mask=mask, **GREEDY)
    for row, kept in zip(made, mask, strict=True):
        alone = pair.plain.generate(row[: len(kept)][kept.bool()][None], **GREEDY)
        assert row[-24:].tolist() == alone[0, -24:].tolist()


def test_forward_counts_positions_of_padded_rows_alone(pair: Pair) -> None:
    ids, mask = pair.ids(40, 33), pair.mask(40, 33)
    with torch.no_grad():
        logits = pair.fast(ids, attention_mask=mask).logits
        for row, own, kept in zip(logits, ids, mask.bool(), strict=True):
            assert_close_rows(row[kept], pair.plain(own[kept][None]).logits[0])


def test_positions_that_do_not_count_tokens_run_transformers_own_forward(pair: Pair) -> None:
    ids, positions = pair.ids(20), torch.arange(5, 25)[None]
    fast = copy.deepcopy(pair.fast)
    with torch.no_grad(), pytest.warns(OptimizerWarning, match="position_ids do not count the tokens"):
        logits = fast(ids, position_ids=positions).logits[0]
    assert_close_rows(logits, pair.plain(ids, position_ids=positions).logits[0])
    with pytest.raises(UnsupportedRequestError, match="position_ids do not count the tokens"), torch.no_grad():
        fast(ids, position_ids=positions, cache=PagedCache(fast))


@pytest.mark.parametrize("tokens", [5, 50, 120])
def test_layers_of_a_cache_have_the_rows_of_the_window(pair: Pair, tokens: int) -> None:
    ids = pair.ids(tokens, tokens)
    with torch.no_grad():
        caches = [take_cache(dict(model(ids, use_cache=True))) for model in (pair.plain, pair.fast)]
    assert len(caches[0].layers) == len(caches[1].layers) == pair.plain.config.num_hidden_layers
    for expected, layer in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            assert getattr(expected, name).shape == getattr(layer, name).shape
            assert_close_rows(getattr(layer, name).flatten(0, 2), getattr(expected, name).flatten(0, 2))


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_hidden_states_runs_transformers_own_loop(pair: Pair, beams: int) -> None:
    options = {**GREEDY, "num_beams": beams, "return_dict_in_generate": True, "output_hidden_states": True}
    fast, ids = copy.deepcopy(pair.fast), pair.ids(20)
    with pytest.warns(OptimizerWarning, match="several residual streams"):
        made = fast.generate(ids, **options)
    expected = pair.plain.generate(ids, **options)
    assert torch.equal(made.sequences, expected.sequences)
    shapes = [[[tuple(state.shape) for state in step] for step in output.hidden_states] for output in (made, expected)]
    assert shapes[0] == shapes[1]


def test_a_cache_is_cropped_to_any_length(pair: Pair) -> None:
    ids, cache = pair.ids(60), PagedCache(pair.fast)
    with torch.no_grad():
        pair.fast(ids, cache=cache)
        for kept in range(59, 30, -4):
            cache.crop(kept)
            logits = pair.fast(ids[:, kept : kept + 9], cache=copy.deepcopy(cache)).logits[0]
            assert_close_rows(logits, pair.plain(ids[:, : kept + 9], use_cache=False).logits[0, kept:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [0, 1])
def test_of_entries_with_equal_scores_the_first_are_read(monkeypatch, backend: str, heads: int) -> None:
    """Scores of trained models are often 0 (ReLU). `torch.topk` leaves their order open, so it is fixed here."""
    plain = random_model(CASES["deepseek_v4-mixed"]())
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if "indexer" in name and name.endswith("weights_proj.weight"):
                weight[heads:] = 0.0  # their heads count nothing
    fast = copy.deepcopy(plain)
    DynamicGraphOptimizer(fast, config=DeepSeekConfig(precision="fp32", backend=backend)).optimize()
    ids, tied, untied = Pair(plain, fast).ids(120), [], torch.Tensor.topk

    def first(scores: torch.Tensor, k: int, dim: int = -1) -> torch.return_types.topk:
        values, indices = scores.sort(dim=dim, descending=True, stable=True)
        tied.append(k < scores.shape[-1] and bool(((values[..., k - 1] == values[..., k]) & values[..., k].isfinite()).any()))
        return torch.return_types.topk((values[..., :k], indices[..., :k]))

    with torch.no_grad():
        logits = fast(ids, use_cache=False).logits[0]
        monkeypatch.setattr(torch.Tensor, "topk", lambda self, k, dim=-1, **options: first(self, k, dim))
        expected = plain(ids, use_cache=False).logits[0]
        monkeypatch.setattr(torch.Tensor, "topk", untied)
    assert any(tied)
    assert_close_rows(logits, expected)


def test_hidden_states_come_from_transformers(pair: Pair) -> None:
    fast, ids = copy.deepcopy(pair.fast), pair.ids(20)
    with torch.no_grad(), pytest.warns(OptimizerWarning, match="several residual streams"):
        states = fast(ids, use_cache=False, output_hidden_states=True).hidden_states
    expected = pair.plain(ids, use_cache=False, output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [state.shape for state in expected]
    assert_close_rows(states[-1][0], expected[-1][0])


def test_packed_documents_run_transformers_own_forward(pair: Pair) -> None:
    ids, positions = pair.ids(20), torch.tensor([[*range(12), *range(8)]])
    fast = copy.deepcopy(pair.fast)
    with torch.no_grad(), pytest.warns(OptimizerWarning, match="several documents"):
        logits = fast(ids, position_ids=positions, use_cache=False).logits[0]
    assert_close_rows(logits, pair.plain(ids, position_ids=positions, use_cache=False).logits[0])


def greedy(pair: Pair, prompt: list[int], count: int) -> list[int]:
    lengths = {"max_new_tokens": count, "min_new_tokens": count}
    return pair.plain.generate(torch.tensor([prompt]), **{**GREEDY, **lengths})[0, len(prompt) :].tolist()


def engine_of(pair: Pair, size: int = 1 << 23, **options):
    runtime = pair.fast.dso
    return make_engine(pair.fast, None, arena=runtime.new_arena(size), **options), runtime


def test_an_engine_continues_a_conversation_and_another_process_does(pair: Pair, tmp_path) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    prompt = pair.ids(70)[0].tolist()
    first, runtime = engine_of(pair, drafts=False)
    [answer] = first.generate([prompt], sampling)
    assert answer.token_ids == greedy(pair, prompt, 20)
    text = [*prompt, *answer.token_ids, 7, 8, 9]
    [second] = first.generate([text], sampling)
    assert second.cached_tokens == 89  # the last token of the answer was not processed
    assert second.token_ids == greedy(pair, text, 20)
    assert save_prefix(tmp_path / "a", runtime, first.core.memory, first.core.prefix, text) == 64
    other, runtime = engine_of(pair, drafts=False)
    assert load_prefix(tmp_path / "a", runtime, other.core.memory, other.core.prefix, text) == 64
    [again] = other.generate([text], sampling)
    assert again.cached_tokens == 64 and again.token_ids == second.token_ids


def test_requests_that_share_and_outgrow_a_small_cache(pair: Pair) -> None:
    """Several answers to a prompt, drafts from the text, and requests that are preempted."""
    shared = pair.ids(64)[0].tolist()
    prompts = [[*shared, *shared[:n], n] for n in (5, 11, 20, 31)]
    block = pair.fast.dso.new_arena(1 << 23).store.block_bytes
    engine, _ = engine_of(pair, 90 * block)
    sampling = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    for prompt, answer in zip(prompts, engine.generate(prompts, sampling), strict=True):
        assert answer.token_ids == greedy(pair, prompt, 30)


def test_a_window_of_the_cache_is_refused(pair: Pair) -> None:
    with pytest.raises(UnsupportedModelError, match="compressed attention"):
        make_engine(pair.fast, None, cache_window=256)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_packed_directories_load_alike(tmp_path, precision: str) -> None:
    pair = make_pair("deepseek_v4-mixed", "reference")
    pair.plain.save_pretrained(tmp_path / "float")
    model = load_model(tmp_path / "float", precision=precision, backend="reference")
    model.save_pretrained(tmp_path / "packed")
    again = load_model(tmp_path / "packed", backend="reference")
    ids = pair.ids(50)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0]
        assert torch.equal(logits, again(ids, use_cache=False).logits[0])
        if precision == "fp32":
            assert_close_rows(logits, pair.plain(ids, use_cache=False).logits[0])


def test_transformers_own_forward_runs_in_bf16(tmp_path) -> None:
    """Routers and indexers are multiplied with hidden states, and must have their dtype whatever the file has."""
    pair = make_pair("deepseek_v4-mixed", "reference")
    pair.plain.save_pretrained(tmp_path / "float")
    path = tmp_path / "float" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    model, ids = load_model(tmp_path / "float", precision="int8", backend="reference"), pair.ids(30)
    with torch.no_grad(), pytest.warns(OptimizerWarning, match="several residual streams"):
        states = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    assert states[-1].dtype == model.model.layers[0].mlp.gate.weight.dtype == torch.bfloat16
    assert states[-1].isfinite().all()
    assert model.model.layers[0].mlp.gate.tid2eid.dtype == torch.int64
