"""Attention over the paged cache equals the reference's formula over the same keys and values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer.backends.base import DECODE, PREFILL, StepBatch
from deepseek_optimizer.backends.cuda import division
from deepseek_optimizer.backends.cuda.kernels import attention, rope
from deepseek_optimizer.backends.cuda.step import DeviceStep, StepIntegers
from deepseek_optimizer.backends.cuda.store import CudaStore
from deepseek_optimizer.backends.reference import ops
from deepseek_optimizer.graph.ir import CacheSpec

from .values import ints, random

CPU = torch.device("cpu")
SCALE = 0.3
# With a bf16 cache, q and weights are rounded to bf16 as well.
BOUND = {"fp32": 3e-6, "bf16": 2**-7, "int8": 2**-7, "fp8": 2**-7}


def on_device(batch: StepBatch, block_q: int, scratch: int | None = None) -> DeviceStep:
    integers = StepIntegers.of(batch, 1, block_q, scratch=scratch)
    memory = torch.empty(integers.size, dtype=torch.int32)
    integers.write(memory.numpy())
    return integers.on(memory)


class Case:
    """Sequences of a step, with random keys and values of all their tokens in a cache of shuffled blocks.

    Args:
        sequences: (phase, tokens before the step, rows).
        heads, kv_heads, head: sizes of attention.
    """

    def __init__(self, sequences, heads, kv_heads, head, kv_dtype="fp32", visible_to=None):
        self.heads, self.kv_heads, self.head = heads, kv_heads, head
        phase, context, rows = (ints(values) for values in zip(*sequences, strict=True))
        total = context + rows
        counts = -(-total // 32)
        self.store = CudaStore(CacheSpec(1, kv_heads, head), kv_dtype, int(counts.sum()) + 2, CPU)
        self.store.ensure(self.store.num_blocks)
        self.store.data.view(torch.uint8).fill_(255)  # NaN: what no row may see must not matter, whatever it is
        blocks = iter(np.random.default_rng(0).permutation(self.store.num_blocks))
        table = np.full((len(sequences), counts.max()), -1, np.int32)
        for row, count in zip(table, counts, strict=True):
            row[:count] = [next(blocks) for _ in range(count)]
        at = np.concatenate([np.arange(c, c + r) for c, r in zip(context, rows, strict=True)])
        self.batch = StepBatch(ints(at * 0), ints(at), rows, context, phase, table, ints([]), visible_to=visible_to)
        for i, tokens in enumerate(total):
            k, v = (random(tokens, kv_heads * head, seed=10 * i + part) for part in (1, 2))
            token = np.arange(tokens)
            slots = torch.from_numpy(ints(table[i][token // 32] * 32 + token % 32))
            rope.rope_cache(None, k, v, None, None, self.store.data, slots, 0, heads=heads, kv_heads=kv_heads)
        self.q = random(len(at), heads * head)

    def made(self, window=0, sinks=0, scratch=None, **more):
        at = on_device(self.batch, division.query_rows(self.heads // self.kv_heads), scratch)
        q = torch.cat((self.q, random(len(at.ids) - len(self.q), self.q.shape[1], seed=3)))
        out = torch.full_like(q, torch.nan)
        for tiles in at.phases:
            attention.attention(
                q, self.store.data, 0, at.tables[0], tiles, at.ends, out, heads=self.heads, kv_heads=self.kv_heads,
                scale=SCALE, window=window, sinks=sinks, **more,
            )  # fmt: skip
        return out[: len(self.q)]

    def exact(self, window=0, sinks=0, softcap=0.0, learned=None, chunked=False, causal=False):
        begin, outputs = 0, []
        for table, context, rows in zip(self.batch.block_table, self.batch.context_len, self.batch.query_len, strict=True):
            k, v = (x.transpose(0, 1).double() for x in self.store.read(0, table[: -(-(context + rows) // 32)], context + rows))
            q = self.q[begin : begin + rows].double().unflatten(-1, (self.kv_heads, -1, self.head))
            ends = None if causal else self.batch.visible_to
            ends = None if ends is None else torch.from_numpy(ends[begin : begin + rows]).long()
            mask = ops.visible(int(rows), int(context), torch.arange(len(k)), window, sinks, chunked, ends)
            sink = None if learned is None else learned.double().unflatten(0, (self.kv_heads, -1))
            outputs.append(ops.attention(q, k, v, mask, SCALE, softcap, sink).flatten(1))
            begin += rows
        return torch.cat(outputs)

    def check(self, window=0, sinks=0, **more):
        exact = self.exact(window, sinks, **more)
        error = (self.made(window, sinks, **more).double() - exact).abs().max()
        assert error <= BOUND[self.store.kv_dtype] * exact.abs().max()


MIXED = [(DECODE, 70, 1), (DECODE, 0, 2), (PREFILL, 0, 40), (PREFILL, 33, 5)]


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8", "fp8"])
@pytest.mark.parametrize(("heads", "kv_heads", "head"), [(6, 2, 20), (2, 2, 16), (5, 1, 8)])
def test_mixed_steps(heads, kv_heads, head, kv_dtype):
    Case(MIXED, heads, kv_heads, head, kv_dtype).check()


@pytest.mark.parametrize(("head", "window", "kv_dtype"), [(160, 0, "bf16"), (260, 0, "fp32"), (260, 9, "bf16")])
def test_large_heads(head, window, kv_dtype):
    """From 257 elements on, two programs share a tile of 16 rows, of which the second may have none."""
    case = Case([(DECODE, 33, 1), (PREFILL, 0, 27), (PREFILL, 33, 5)], 4, 1, head, kv_dtype)
    case.q /= 4  # scores as of small heads, whose rounding the bound is for
    case.check(window)


@pytest.mark.parametrize(("window", "sinks"), [(37, 0), (5, 0), (37, 4), (40, 64), (500, 3)])
def test_windows_and_sinks(window, sinks):
    case = Case([(DECODE, 200, 1), (PREFILL, 90, 21)], 2, 1, 16)
    case.check(window, sinks)
    seen = [range(-(-sinks // 32)), range(max(0, 201 - window) // 32, 7)]
    hidden = set(range(7)) - {block for part in seen for block in part}
    if window < 200:
        assert hidden or sinks >= 64
    before = case.made(window, sinks)
    case.batch.block_table[0][sorted(hidden)] = -1  # blocks that were released
    assert torch.equal(case.made(window, sinks), before)


def test_long_contexts_are_divided_into_chunks():
    case = Case([(DECODE, 600, 1), (DECODE, 3, 1)], 2, 1, 16)
    (tiles,) = on_device(case.batch, 1).phases
    assert division.chunks_of(tiles.planned, tiles.blocks, 1) == 4  # of which the last has no block
    case.check()
    case.check(window=290)


def test_scores_with_a_limit_and_sinks_that_were_learned():
    """With one chunk and several, and sinks that are larger and smaller than all scores."""
    case = Case([(DECODE, 600, 1), (PREFILL, 20, 5)], 3, 1, 8)
    learned = torch.tensor([0.5, 40.0, -40.0])
    case.check(learned=learned)
    case.check(window=40, learned=learned, softcap=2.0)
    case.check(softcap=1.5)


@pytest.mark.parametrize("prompts", [(), [(PREFILL, 0, 5)]], ids=["padding rows", "padding tiles"])
def test_padding_changes_no_bit(prompts):
    """Of a step with several chunks: three rows are padded to four; eight rows need none, but a tile more than there are."""
    case = Case([(DECODE, 600, 1), (DECODE, 3, 1), (DECODE, 40, 1), *prompts], 2, 1, 16)
    case.store.data[case.store.scratch] = 0
    assert torch.equal(case.made(scratch=case.store.scratch), case.made())


def test_rows_that_see_later_tokens():
    ends = ints([71, *[12] * 6, *range(7, 13)])
    ends[7:] = [7, 12, 12, 12, 12, 12]
    case = Case([(DECODE, 70, 1), (PREFILL, 6, 6), (PREFILL, 6, 6)], 4, 2, 16, visible_to=ends)
    case.check()
    case.check(window=8)
    case.check(causal=True)


@pytest.mark.parametrize("window", [27, 40, 64])
def test_chunks_at_fixed_places(window):
    """Of one tile, rows before and after the beginning of a chunk; blocks of earlier chunks may be missing."""
    case = Case([(DECODE, 200, 1), (PREFILL, 50, 21)], 2, 1, 16)
    case.check(window, chunked=True)
    before = case.made(window, chunked=True)
    case.batch.block_table[0][: 200 // window * window // 32] = -1
    assert torch.equal(case.made(window, chunked=True), before)


def test_chunks_fill_the_card_and_no_more():
    assert division.chunks_of(1, 4096, 8) == 64 and division.chunks_of(1, 9, 8) == 2 and division.chunks_of(64, 4096, 8) == 1
    assert [division.query_rows(group) for group in (1, 2, 3, 8, 71)] == [64, 32, 16, 8, 1]
    assert division.query_rows(16, division.LATENT_ROWS) == 2
