"""Which steps share a captured graph. No Triton is needed."""

from __future__ import annotations

import numpy as np
import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL, StepBatch
from deepseek_optimizer.backends.cuda.buckets import Bucket, blocks_bucket, may_be_captured, rows_bucket


def batch_of(*sequences, logit_rows=(), **more):
    """A step of these (phase, tokens before, rows)."""
    phase, context, rows = (np.array(values, np.int32) for values in zip(*sequences, strict=True))
    ids = np.zeros(rows.sum(), np.int32)
    table = np.zeros((len(rows), 99), np.int32)
    return StepBatch(ids, ids, rows, context, phase, table, np.array(logit_rows, np.int32), **more)


def test_counts_are_rounded_up():
    assert [rows_bucket(n) for n in (0, 1, 2, 3, 5, 17, 32, 33, 65, 256)] == [0, 1, 2, 4, 8, 32, 32, 64, 96, 256]
    assert [blocks_bucket(n) for n in (1, 8, 9, 65)] == [8, 8, 16, 128]


def test_counts_of_a_bucket_have_the_same_next_power_of_two():
    """By which kernels choose their constants: so a row has the same bits in all steps of a bucket."""
    for count in range(1, 513):
        assert (count - 1).bit_length() == (rows_bucket(count) - 1).bit_length()


def test_padding_rows_are_tiles_of_one_row():
    decoding = batch_of((DECODE, 300, 1), (DECODE, 7, 2), logit_rows=[0, 1, 2])
    assert Bucket.of(decoding, 16) == Bucket(rows=4, one_row=4, tiles=0, blocks=16, logit_rows=4, states=False)
    mixed = batch_of((DECODE, 300, 1), (PREFILL, 0, 17), logit_rows=[0, 17], last_hidden=True)
    assert Bucket.of(mixed, 16) == Bucket(rows=32, one_row=16, tiles=2, blocks=16, logit_rows=2, states=True)
    prompt = batch_of((PREFILL, 0, 16))
    assert Bucket.of(prompt, 16) == Bucket(rows=16, one_row=0, tiles=1, blocks=8, logit_rows=0, states=False)


def test_large_steps_and_steps_with_other_inputs_are_not_captured():
    assert may_be_captured(batch_of((PREFILL, 0, 256)))
    assert not may_be_captured(batch_of((PREFILL, 0, 257)))
    assert not may_be_captured(batch_of((PREFILL, 0, 1), hidden=True))
    assert not may_be_captured(batch_of((PREFILL, 0, 1), inputs_embeds=torch.zeros(1, 4)))
    assert not may_be_captured(batch_of((PREFILL, 0, 1), features=torch.zeros(1, 1, 4)))
    assert not may_be_captured(batch_of((PREFILL, 0, 1), axes=np.zeros((1, 3), np.int32)))
