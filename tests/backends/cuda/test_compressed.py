"""Kernels of compressed attention and hyper-connections equal the reference's formulas over odd shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer.backends.base import DECODE, PREFILL, StepBatch
from deepseek_optimizer.backends.cuda import division
from deepseek_optimizer.backends.cuda.kernels import compress, compressed_attention, heads, indexer, latent, streams
from deepseek_optimizer.backends.cuda.kv_b import grouped_stack
from deepseek_optimizer.backends.cuda.matrices import DeviceStack
from deepseek_optimizer.backends.cuda.rows_store import CudaRowsStore
from deepseek_optimizer.backends.cuda.step import StepIntegers
from deepseek_optimizer.backends.reference import latent as reference_latent
from deepseek_optimizer.backends.reference import ops
from deepseek_optimizer.backends.reference import streams as reference_streams
from deepseek_optimizer.backends.reference.compressed import entries
from deepseek_optimizer.graph.ir import CachedRows, RowsSpec
from deepseek_optimizer.quant import pack, unpack

from .values import ints, random

CPU = torch.device("cpu")
STEPS = [(DECODE, 70, 1), (DECODE, 5, 3), (PREFILL, 0, 12), (PREFILL, 33, 9)]


def close(made, exact, bound=3e-6):
    assert (made.double() - exact.double()).abs().max() <= bound * exact.abs().max()


@pytest.mark.parametrize("count", [1, 3, 4])
def test_weights_of_streams(count):
    for width, scales in ((count, 1), ((2 + count) * count, 3)):
        x, bias, scale = random(5, width) * 2, random(width, seed=1), random(scales, seed=2)
        exact = reference_streams.weights(x, bias, scale, count, 5, 1e-4)
        streams.weights(x, bias, scale, x, count, 5, 1e-4)  # in place
        torch.testing.assert_close(x, exact, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize(("count", "width"), [(1, 40), (3, 1030)])
def test_streams_are_collapsed_and_expanded(count, width):
    x, weights, y = random(4, count * width), random(4, (2 + count) * count, seed=1), random(4, width, seed=2)
    collapsed, expanded = torch.full_like(y, torch.nan), torch.full_like(x, torch.nan)
    streams.collapse(x, weights, collapsed)
    streams.expand(x, weights, y, expanded)
    close(collapsed, reference_streams.collapse(x, weights, count))
    close(expanded, reference_streams.expand(x, weights, y, count))


@pytest.mark.parametrize("format_name", ["fp32", "int8"])
@pytest.mark.parametrize(("rows", "tokens"), [(14, 2), (16, 7)])
def test_grouped_products(rows, tokens, format_name):
    """Groups of whole tiles keep their format; others are repacked."""
    matrix, x = pack(random(3 * rows, 40), format_name), random(tokens, 3, 40, seed=1)
    packed = grouped_stack(matrix, 3)
    assert packed.format == (format_name if rows == 16 or format_name == "fp32" else "bf16")
    stack, out = DeviceStack(packed, CPU), torch.full((tokens, 3, rows), torch.nan)
    heads.HeadInputs(x, stack).products(stack, 0, out)
    exact = torch.einsum("tgk,gnk->tgn", x, unpack(matrix).unflatten(0, (3, rows)))
    close(out, exact, 3e-6 if format_name == "fp32" else 2**-6)


class Case:
    """A step over a cache of shuffled blocks whose rows of tokens and entries are random, in two groups of the cache.

    Args:
        every: tokens of an entry. series: 2 if entries overlap, otherwise 1. width: of an entry.
        sequences: (phase, tokens before the step, rows).
    """

    def __init__(self, every, series, width, kv_dtype="fp32", sequences=STEPS):
        self.every, self.series = every, series
        kinds = CachedRows(8), CachedRows(2 * series * width), CachedRows(width), CachedRows(width, every=every)
        spec = RowsSpec(kinds, (0, 1, 1, 0))  # a kind that nothing reads, sources, rows of tokens, entries
        phase, context, rows = (ints(values) for values in zip(*sequences, strict=True))
        self.totals, counts = context + rows, -(-(context + rows) // 32)
        self.store = CudaRowsStore(spec, kv_dtype, 2 * int(counts.sum()) + 1, CPU)
        self.store.ensure(self.store.num_blocks)
        self.store.data.fill_(torch.nan)  # what no row may see must not matter, whatever it is
        blocks = iter(np.random.default_rng(0).permutation(self.store.num_blocks))
        self.tables = np.full((2, len(sequences), counts.max()), -1, np.int32)
        for group in self.tables:
            for row, count in zip(group, counts, strict=True):
                row[:count] = [next(blocks) for _ in range(count)]
        at = np.concatenate([np.arange(c, c + r) for c, r in zip(context, rows, strict=True)])
        self.batch = StepBatch(ints(at * 0), ints(at), rows, context, phase, self.tables, ints([]))
        for i, tokens in enumerate(self.totals):
            token = np.arange(tokens)
            slots = torch.from_numpy(ints(self.tables[1][i][token // 32] * 32 + token % 32))
            for kind in (1, 2):
                values = random(tokens, spec.rows[kind].width, seed=10 * i + kind)
                latent.store(values, self.store.data, slots, self.store.offsets[kind])

    def write_entries(self):
        """Random entries of all tokens."""
        for i, tokens in enumerate(self.totals):
            last = np.arange(tokens // self.every) * self.every + self.every - 1
            at = torch.from_numpy(self.tables[0][i][last // 32]).long(), torch.from_numpy(last % 32 // self.every)
            width = self.store.spec.rows[3].width
            self.store._kinds.write(self.store.data.view(torch.uint8), 3, at, random(len(last), width, seed=10 * i + 3))

    def on_device(self, block_q):
        integers = StepIntegers.of(self.batch, 2, block_q)
        memory = torch.empty(integers.size, dtype=torch.int32)
        integers.write(memory.numpy())
        return integers.on(memory)

    def sequences(self):
        """Number, tokens before the step, and rows of the step of each sequence."""
        starts = np.cumsum(self.batch.query_len) - self.batch.query_len
        for i, (first, context, rows) in enumerate(zip(starts, self.batch.context_len, self.batch.query_len, strict=True)):
            yield i, int(context), slice(int(first), int(first + rows))

    def read(self, kind, sequence):
        group = self.store.group_of(kind)
        return self.store.read(kind, self.tables[group][sequence], int(self.totals[sequence]))[0]


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("every", "series", "width", "rot"), [(3, 2, 20, 6), (4, 1, 16, 16), (11, 1, 36, 4)])
def test_entries_are_compressed(every, series, width, rot, kv_dtype):
    """Those that the step completes, and no others."""
    case = Case(every, series, width, kv_dtype)
    bias, norm = random(every, series * width, seed=7), random(width, seed=8)
    frequencies, at = torch.linspace(1, 0.1, rot // 2), case.on_device(4)
    compress.compress(
        case.store.data, bias, norm, frequencies[None], at.ends, at.sequence, at.tables[1], at.tables[0],
        case.store.offsets[1], case.store.offsets[3], overlap=series == 2, eps=1e-5, scaling=1.3, first_rotated=width - rot,
    )  # fmt: skip
    for i, context, rows in case.sequences():
        made, source = case.read(3, i), case.read(1, i)
        first, end = context // every, (context + rows.stop - rows.start) // every
        assert made[:first].isnan().all()
        windows = source[: len(made) * every].unflatten(0, (-1, every)) if len(made) else source.new_zeros(0, every, 4)
        before = torch.cat((torch.full_like(windows[:1], torch.nan), windows[:-1])) if series == 2 else None
        if end > first:
            exact = ops.rms_norm(entries(windows, before, bias), norm, 1e-5)
            table = ops.rope_table(torch.arange(len(made)) * every, frequencies, 1.3)
            exact = ops.rope(exact, table, 1, True, width - rot)
            close(made[first:], exact[first:], 3e-6 if kv_dtype == "fp32" else 2**-8)


@pytest.mark.parametrize("every", [3, 40])
def test_entries_are_chosen(every):
    case = Case(every, 1, 12)
    case.write_entries()
    count, top_k, at = sum(r for _, _, r in STEPS), 5, case.on_device(1)
    q, weights, chosen = random(count, 4 * 12), random(count, 4, seed=1), torch.full((count, top_k), torch.nan)
    indexer.choose(q, weights, case.store.data, case.store.offsets[3], at.tables[0], at.sequence, at.ends, chosen, 0.5, every)
    for i, context, rows in case.sequences():
        keys, token = case.read(3, i), torch.arange(context, context + rows.stop - rows.start)
        seen = torch.arange(len(keys)) < ((token + 1) // every)[:, None]
        scores = reference_latent.index_scores(q[rows].unflatten(-1, (4, 12)), weights[rows], keys, 0.5)
        exact = reference_latent.choose(scores, seen, top_k) if len(keys) else torch.full((len(token), top_k), -1.0)
        assert torch.equal(chosen[rows], exact)


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("every", "top_k", "head_count", "window"), [(0, 0, 3, 9), (3, 0, 3, 21), (3, 4, 18, 21), (7, 0, 2, 40)]
)
def test_attention(every, top_k, head_count, window, kv_dtype):
    check_attention(Case(every or 3, 1, 20, kv_dtype), every, top_k, head_count, window)


@pytest.mark.parametrize("top_k", [0, 64])
def test_long_contexts_are_divided_into_chunks(top_k):
    """Of windows and entries; a chosen entry is far from the next."""
    case = Case(3, 1, 20, sequences=[(DECODE, 1500, 1), (DECODE, 3, 1)])
    (tiles,) = case.on_device(1).phases
    blocks = compressed_attention.rows_blocks(tiles.blocks, 290, 3, top_k)
    assert division.chunks_of(tiles.planned, blocks, 1) == (2 if top_k else 5)
    check_attention(case, 3, top_k, 2, 290)


def check_attention(case, every, top_k, head_count, window):
    case.write_entries()
    count = len(case.batch.positions)
    q, sinks = random(count, head_count, 20), random(head_count, seed=1)
    chosen = None
    if top_k:
        chosen = torch.full((count, top_k), -1.0)
        for _, context, rows in case.sequences():
            for row, token in zip(range(rows.start, rows.stop), range(context, context + count)):  # noqa: B905
                some = torch.randperm((token + 1) // every, generator=torch.Generator().manual_seed(row))[:top_k]
                chosen[row, : len(some)] = some.sort().values.float()
    shared = min(division.HEAD_ROWS, head_count)
    at = case.on_device(1 if top_k else division.query_rows(shared, division.LATENT_ROWS))
    out = torch.full_like(q, torch.nan)
    for tiles in at.phases:
        compressed_attention.attention(
            q, case.store.data, case.store.offsets[2], at.tables[1],
            (case.store.offsets[3], at.tables[0], every) if every else None, tiles, sinks, out, scale=0.3, window=window,
            chosen=chosen,
        )  # fmt: skip
    for i, context, rows in case.sequences():
        keys, queries = case.read(2, i), rows.stop - rows.start
        mask = ops.visible(queries, context, torch.arange(len(keys)), window)
        if every:
            more, token = case.read(3, i), torch.arange(context, context + queries)
            visible = torch.arange(len(more)) < ((token + 1) // every)[:, None]
            if chosen is not None:
                visible &= reference_latent.chosen_keys(chosen[rows], len(more))
            keys, mask = torch.cat((keys, more)), torch.cat((mask, visible), -1)
        keys = keys[:, None].double()
        exact = ops.attention(q[rows, None].double(), keys, keys, mask, 0.3, 0.0, sinks[None].double())[:, 0]
        close(out[rows], exact, 3e-6 if case.store.kv_dtype == "fp32" else 2**-7)
