"""Invalid step batches raise an error that names the field, before anything is read out of bounds or written."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.cpu import CpuBackend, native, unavailable_reason
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.ir import CacheSpec, LatentSpec
from deepseek_optimizer.models import build_graph
from support.models import CASES, random_model, weights_of
from support.steps import Part, make_batch, run_step, runner

from .packing import packed_weights

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")


@pytest.fixture(scope="module")
def ready():
    """A plan with its cache, and a valid batch of a decode and a prefill sequence."""
    model = random_model(CASES["llama-gqa"]())
    graph, _ = rules.apply(build_graph(model.config), None)
    made = runner(CpuBackend(threads=2), graph, packed_weights(weights_of(model), "fp32"), blocks=8)
    first, second = made.sequence(), made.sequence()
    run_step(made.plan, made.store, [Part(first, list(range(33)))])
    batch = make_batch([Part(first, [5], DECODE), Part(second, [6, 7, 8], PREFILL)], made.store)
    return made, batch, made.plan.run(batch, made.store).logits


SHORT = ["token_ids", "query_len", "context_len", "phase", "block_table"]  # the other lengths determine T and R
ALL = [*SHORT, "positions", "logit_rows"]


def refused(ready, name, array):
    made, batch, logits = ready
    with pytest.raises(ValueError, match=name if name != "query_len" else "query_len|context_len"):
        made.plan.run(replace(batch, **{name: array}), made.store)
    assert torch.equal(made.plan.run(batch, made.store).logits, logits)


@pytest.mark.parametrize("name", SHORT)
def test_too_short(ready, name):
    refused(ready, name, getattr(ready[1], name)[:-1])


@pytest.mark.parametrize("name", ALL)
def test_not_int32(ready, name):
    refused(ready, name, getattr(ready[1], name).astype(np.int64))


@pytest.mark.parametrize("name", ALL)
def test_not_contiguous(ready, name):
    spread = np.repeat(getattr(ready[1], name), 2, axis=-1)[..., ::2]
    assert np.array_equal(spread, getattr(ready[1], name))
    refused(ready, name, spread)


def test_block_table_of_one_dimension(ready):
    refused(ready, "block_table", ready[1].block_table[0])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("token_ids", -1, r"token_ids\[0\] is -1"),
        ("token_ids", 2**31 - 1, r"token_ids\[0\] is 2147483647"),
        ("query_len", 2**31 - 1, "context_len|query_len"),
        ("context_len", 2**31 - 1, r"context_len\[0\] is 2147483647"),
        ("context_len", 32 * 1000, "max_blocks"),
        ("phase", 7, r"phase\[0\] is 7"),
        ("logit_rows", 4, r"logit_rows\[0\] is 4"),
    ],
)
def test_absurd_values(ready, name, value, words):
    made, batch, logits = ready
    wrong = getattr(batch, name).copy()
    wrong[0] = value
    with pytest.raises(ValueError, match=words):
        made.plan.run(replace(batch, **{name: wrong}), made.store)
    assert torch.equal(made.plan.run(batch, made.store).logits, logits)


@pytest.mark.parametrize("block", [-1, 8, 2**31 - 1])
def test_blocks_outside_the_cache(ready, block):
    made, batch, _ = ready
    table = batch.block_table.copy()
    table[0, 1] = block
    with pytest.raises(ValueError, match=rf"block_table\[0\]\[1\] is {block}"):
        made.plan.run(replace(batch, block_table=table), made.store)


def test_copies_of_a_plan_and_store_share_memory(ready):
    made, batch, logits = ready
    for _ in range(3):  # if a copy destroyed the handle, the next one would fail
        plan, store = copy.copy(made.plan), copy.copy(made.store)
        assert torch.equal(plan.run(batch, store).logits, logits)
        del plan, store
    with pytest.raises(BackendError, match="cannot be copied"):
        copy.deepcopy(made.plan)
    with pytest.raises(ValueError, match="ctypes"):
        copy.deepcopy(made.store)


@pytest.mark.parametrize("head_dim", [0, 17, 514])
def test_unsupported_head_sizes_are_rejected(head_dim):
    assert native.block_bytes(CacheSpec(1, 1, 256), "bf16") == 32 * 256 * 2 * 2
    with pytest.raises(ValueError, match="must be even and at most 512"):
        native.block_bytes(CacheSpec(1, 1, head_dim), "bf16")


@pytest.mark.parametrize(("kv", "bytes_a_token"), [("bf16", 1152), ("int8", 656), ("fp32", 2304)])
def test_bytes_of_a_latent(kv, bytes_a_token):
    assert native.block_bytes(LatentSpec(27, 512, 64), kv) == 32 * 27 * bytes_a_token
    with pytest.raises(ValueError, match="rank is 33"):
        native.block_bytes(LatentSpec(27, 33, 64), kv)


def test_logits_are_written_to_the_given_buffer(ready):
    made, batch, logits = ready
    room = torch.full_like(logits, torch.nan)
    assert made.plan.run(replace(batch, logits=room), made.store).logits is room
    assert torch.equal(room, logits)


@pytest.mark.parametrize("wrong", [lambda x: x[:-1], lambda x: x.double(), lambda x: x.repeat(1, 2)[:, ::2]])
def test_a_too_small_logits_buffer(ready, wrong):
    made, batch, logits = ready
    with pytest.raises(ValueError, match="logits must be contiguous float32"):
        made.plan.run(replace(batch, logits=wrong(torch.zeros_like(logits))), made.store)
