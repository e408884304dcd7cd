"""The integers of steps that decode are those that any step's are made of. No Triton is needed."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_optimizer.backends.base import DECODE, PREFILL, StepBatch
from deepseek_optimizer.backends.cuda import decoding_step
from deepseek_optimizer.backends.cuda.buckets import Bucket
from deepseek_optimizer.backends.cuda.decoding_step import DecodingSteps, decodes
from deepseek_optimizer.backends.cuda.step import StepIntegers

SCRATCH = 700


def step(rng, sequences, groups=1, longest=600, width=24, rows=None, **more):
    """A random step: ids, positions apart from the context, tables wider than needed."""
    context = rng.integers(0, longest, sequences)
    table = rng.integers(0, SCRATCH, (groups, sequences, width))
    i32 = lambda values: np.asarray(values, np.int32)  # noqa: E731
    logit_rows = np.sort(rng.permutation(sequences)[: sequences if rows is None else rows])
    return StepBatch(
        i32(rng.integers(0, 31, sequences)), i32(context + 3), np.ones(sequences, np.int32), i32(context),
        np.full(sequences, DECODE, np.int32), i32(table if groups > 1 else table[0]), i32(logit_rows), **more,
    )  # fmt: skip


@pytest.mark.parametrize("groups", [1, 3])
def test_integers_are_those_of_any_step(groups):
    """Whatever step of a bucket came before."""
    rng, steps = np.random.default_rng(groups), DecodingSteps(groups, 16)
    for sequences, longest, width, rows in [
        (3, 600, 24, None),
        (3, 600, 20, 1),
        (4, 600, 24, 0),
        (3, 200, 8, None),
        (1, 9, 1, 1),
    ]:
        for _ in range(3):
            batch = step(rng, sequences, groups, longest, width, rows)
            made, exact = steps.of(batch, SCRATCH), StepIntegers.of(batch, groups, 16, None, SCRATCH)
            assert made.bucket == exact.bucket == Bucket.of(batch, 16) and made.size == exact.size
            ours, theirs = np.full(made.size, -7, np.int32), np.full(exact.size, -7, np.int32)
            made.write(ours)
            exact.write(theirs)
            begin = 0
            for array, size in zip(exact.arrays, exact.sizes, strict=True):
                assert np.array_equal(ours[begin : begin + array.size], theirs[begin : begin + array.size])
                begin += size


def test_only_steps_that_decode_are_made_so():
    rng = np.random.default_rng(1)
    assert decodes(step(rng, 3))
    prompt, drafts = step(rng, 2), step(rng, 2)
    prompt.phase[1] = PREFILL
    drafts.query_len[0], drafts.positions = 2, np.zeros(3, np.int32)
    assert not decodes(prompt) and not decodes(drafts)
    assert not decodes(step(rng, 2, visible_to=np.ones(2, np.int32)))


def test_only_so_many_are_kept(monkeypatch):
    monkeypatch.setattr(decoding_step, "MOST_KEPT", 2)
    rng, steps = np.random.default_rng(2), DecodingSteps(1, 16)
    for sequences in (1, 2, 3, 2):
        steps.of(step(rng, sequences), SCRATCH)
    assert [key[1] for key in steps._kept] == [3, 2]
