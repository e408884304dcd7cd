"""Several documents in one row, separated by positions that restart, do not attend to each other, as in Transformers."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest
import torch
from transformers.masking_utils import find_packed_sequence_indices

from deepseek_optimizer.integration.bind.packed_model import OptimizerWarning
from deepseek_optimizer.integration.generation.steps import documents_of
from support.models import assert_close_rows, native_cases

from .conftest import make_pair


def restarting(*rows: list[int]) -> torch.Tensor:
    """position_ids of rows that pack documents of these lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])


# In Transformers, the position that decides the queries' factor counts from the start of the row, not of the document.
COUNTS_ROWS = ("llama4_text-chunks",)


@pytest.fixture(autouse=True)
def _served_by_the_plan():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an OptimizerWarning would mean that Transformers' forward was used
        yield


# In Transformers, documents of a row are one text: gpt-oss does not pass position_ids to its masks, and recurrent layers don't
# read them.
RECURRENT = ("lfm2-", "lfm2_moe-", "qwen3_next-", "qwen3_5_text-", "qwen3_5_moe_text-", "kimi_linear-")
COMPRESSED = ("deepseek_v4-",)
ONE_TEXT = ("gpt_oss-", *RECURRENT, *COMPRESSED)


@pytest.mark.parametrize("case", [case for case in native_cases() if case.startswith(ONE_TEXT)])
@torch.no_grad()
def test_families_that_do_not_separate_documents(case):
    pair = make_pair(case, backend="auto")
    ids, positions = pair.ids(40, 40), restarting([1, 17, 22], [33, 3, 4])
    told = case.startswith((*RECURRENT, *COMPRESSED))
    expected = pytest.warns(OptimizerWarning, match="recurrent|compressed") if told else contextlib.nullcontext()
    with expected:
        fast = pair.fast(ids, position_ids=positions, use_cache=False).logits
    assert_close_rows(fast, pair.plain(ids, position_ids=positions, use_cache=False).logits)


@pytest.mark.parametrize("case", [case for case in native_cases() if not case.startswith(ONE_TEXT)])
@torch.no_grad()
def test_documents_are_separate_on_every_family(case):
    pair = make_pair(case, backend="auto")
    ids, positions = pair.ids(40, 40), restarting([1, 17, 22], [33, 3, 4])
    fast = pair.fast(ids, position_ids=positions, use_cache=False).logits
    if case not in COUNTS_ROWS:
        assert_close_rows(fast, pair.plain(ids, position_ids=positions, use_cache=False).logits)
    alone = torch.cat([pair.plain(ids[:1, begin:end], use_cache=False).logits for begin, end in ((0, 1), (1, 18), (18, 40))], 1)
    assert_close_rows(fast[:1], alone)


@pytest.mark.parametrize("chunk", [1, 5, 32, 33])
@torch.no_grad()
def test_in_any_chunks(chunk):
    pair = make_pair(backend="auto", prefill_chunk=chunk)
    ids, positions = pair.ids(75, 75), restarting([31, 33, 11], [75])
    fast = pair.fast(ids, position_ids=positions, use_cache=False)
    assert_close_rows(fast.logits, pair.plain(ids, position_ids=positions, use_cache=False).logits)


@torch.no_grad()
def test_documents_are_bitwise_equal_to_each_alone(pair):
    ids, positions = pair.ids(64), restarting([20, 44])
    packed = pair.fast(ids, position_ids=positions, use_cache=False).logits
    assert torch.equal(packed[:, 20:], pair.fast(ids[:, 20:], use_cache=False).logits)


@torch.no_grad()
def test_one_row_of_positions_applies_to_all(pair):
    ids, positions = pair.ids(9, 9, 9), restarting([4, 5])
    fast, plain = (m(ids, position_ids=positions, use_cache=False).logits for m in (pair.fast, pair.plain))
    assert_close_rows(fast, plain)


@torch.no_grad()
def test_other_outputs_of_a_call(pair):
    ids, positions = pair.ids(12, 12), restarting([5, 7], [3, 9])
    call = {"position_ids": positions, "use_cache": False, "labels": ids, "logits_to_keep": 0, "output_hidden_states": True}
    fast, plain = pair.fast(ids, **call), pair.plain(ids, **call)
    torch.testing.assert_close(fast.loss, plain.loss, rtol=1e-5, atol=1e-5)
    for a, b in zip(fast.hidden_states, plain.hidden_states, strict=True):
        assert_close_rows(a, b)
    call = {"position_ids": positions, "use_cache": False, "logits_to_keep": torch.tensor([4, 5, 11])}
    embeds = pair.plain.get_input_embeddings()(ids)
    assert_close_rows(pair.fast(inputs_embeds=embeds, **call).logits, pair.plain(ids, **call).logits)


@torch.no_grad()
def test_dynamic_rope_follows_the_row():
    pair = make_pair("llama-dynamic", backend="auto")
    n = pair.plain.config.max_position_embeddings
    ids, positions = pair.ids(n + 9), restarting([n + 3, 6])
    fast, plain = (m(ids, position_ids=positions, use_cache=False).logits for m in (pair.fast, pair.plain))
    assert_close_rows(fast, plain)


@pytest.mark.parametrize("condition", ["a cache", "a mask"])
@torch.no_grad()
def test_not_separated_where_transformers_does_not(pair, condition):
    ids, positions = pair.ids(10), restarting([4, 6])
    call = {"use_cache": True} if condition == "a cache" else {"use_cache": False, "attention_mask": torch.ones_like(ids)}
    fast, plain = (m(ids, position_ids=positions, **call).logits for m in (pair.fast, pair.plain))
    assert_close_rows(fast, plain)
    separate = pair.plain(ids, position_ids=positions, use_cache=False).logits
    assert not torch.allclose(plain[:, 4:], separate[:, 4:], atol=1e-3)


def test_packed_rows_are_not_cached(fresh_pair):
    ids, positions = fresh_pair.ids(40), restarting([20, 20])
    fresh_pair.fast(ids, use_cache=False)
    free = fresh_pair.fast.dso.arena.manager.free_blocks
    fresh_pair.fast(ids, position_ids=positions, use_cache=False)
    assert fresh_pair.fast.dso.arena.manager.free_blocks == free


def test_documents_are_detected_by_transformers_rule():
    random = np.random.default_rng(0)
    for _ in range(300):
        shape = tuple(random.integers(1, 9, 2))
        positions = random.integers(0, 4, shape).cumsum(1) % 6
        expected = find_packed_sequence_indices(torch.from_numpy(positions))
        actual = documents_of(positions.astype(np.int32))
        assert (actual is None) == (expected is None)
        if expected is not None:
            np.testing.assert_array_equal(actual, expected.numpy())


@pytest.mark.parametrize("mode", [{"attention_optimization": "sliding", "attention_window": 16}, {"sparse_attention": True}])
@torch.no_grad()
def test_each_document_has_its_own_window(mode):
    pair = make_pair(backend="auto", **mode)
    ids, positions = pair.ids(90), restarting([50, 40])
    packed = pair.fast(ids, position_ids=positions, use_cache=False).logits
    alone = [pair.fast(ids[:, begin:end], use_cache=False).logits for begin, end in ((0, 50), (50, 90))]
    assert torch.equal(packed, torch.cat(alone, 1))
