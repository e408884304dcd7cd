"""The lightning indexer chooses as the reference does, down to ties, and attention to chosen tokens equals its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.cuda import division
from deepseek_optimizer.backends.cuda.kernels import indexer, latent, latent_attention
from deepseek_optimizer.backends.cuda.latent_store import CudaLatentStore
from deepseek_optimizer.backends.reference import latent as reference
from deepseek_optimizer.graph.ir import LatentSpec

from .test_attention import on_device
from .test_latents import SCALE, Case, random

CPU = torch.device("cpu")
HEADS, WIDTH, TOKENS = 20, 24, 70


@pytest.fixture
def keys():
    """A cache with the keys of one sequence in shuffled blocks, their values, and the sequence's table."""
    store, table = CudaLatentStore(LatentSpec(2, 8, 4, WIDTH), "fp32", 5, CPU), torch.tensor([[3, 0, 4]], dtype=torch.int32)
    store.ensure(5)
    store.data.fill_(torch.nan)
    at, values = torch.arange(TOKENS), random(TOKENS, WIDTH, seed=3)
    latent.store(values, store.data, (table[0][at // 32] * 32 + at % 32).int(), store.index_offset(1))
    assert torch.equal(store.read(1, table[0].numpy(), TOKENS)[1], values)
    return store, values, table


@pytest.mark.parametrize("top_k", [16, 40])
def test_choices(keys, top_k, monkeypatch):
    """Of rows that see fewer and more tokens than are chosen; a few rows at a time."""
    store, values, table = keys
    ends = torch.tensor([1, 16, 17, 40, 69, 70], dtype=torch.int32)
    q, weights, chosen = random(6, HEADS * WIDTH), random(6, HEADS, seed=1), torch.full((6, top_k), torch.nan)
    monkeypatch.setattr(division, "_SCORE_BYTES", 4 * 96 * 4)
    assert division.rows_at_once(96) == 4
    sequence = torch.zeros(6, dtype=torch.int32)
    indexer.choose(q, weights, store.data, store.index_offset(1), table, sequence, ends, chosen, SCALE)
    scores = reference.index_scores(q.unflatten(-1, (HEADS, WIDTH)), weights, values, SCALE)
    assert torch.equal(chosen, reference.choose(scores, torch.arange(TOKENS) < ends[:, None], top_k))


def test_equal_scores():
    """The first of equal scores are chosen, also where some are -0, and whatever is beyond the last token."""
    scores = torch.tensor([2.0, 0.0, -0.0, -1.0, 0.0, 5.0, 0.0, -3.0, float("nan")]).repeat(2, 1)
    for top_k in (1, 4, 8):
        chosen = torch.full((2, top_k), torch.nan)
        ends = torch.tensor([8, 3], dtype=torch.int32)
        indexer.choose_best[(2,)](scores, ends, chosen, 9, EVERY=1, TOP_K=top_k, BLOCK=4, num_warps=1)
        exact = reference.choose(scores[:, :8], torch.arange(8) < ends[:, None], top_k)
        assert torch.equal(chosen, exact)


@pytest.mark.parametrize("top_k", [24, 33])
def test_attention_to_chosen_tokens(top_k):
    case = Case([(DECODE, 70, 1), (PREFILL, 0, 3), (PREFILL, 33, 2)])
    at, token = on_device(case.batch, 1), np.concatenate([[70], [0, 1, 2], [33, 34]])
    visible = torch.arange(96) <= torch.from_numpy(token)[:, None]
    chosen = reference.choose(random(6, 96, seed=4), visible, top_k)
    out = torch.full((6, 3, case.values.rows), torch.nan)
    latent_attention.latent_attention(
        case.q, case.keys, case.values, case.store.data, 0, at.tables[0], at.phases, at.ends, out, scale=SCALE, chosen=chosen
    )
    exact = case.exact(allowed=reference.chosen_keys(chosen, 96))
    assert (out.flatten(1) - exact.flatten(1)).abs().max() <= 5e-6 * exact.abs().max()
