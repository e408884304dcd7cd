"""Latent attention over the paged cache of latents equals the reference's formulas, and so do the cache's rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer.backends.base import DECODE, PREFILL, StepBatch
from deepseek_optimizer.backends.cuda import division
from deepseek_optimizer.backends.cuda.kernels import expanded_attention, heads, latent, latent_attention
from deepseek_optimizer.backends.cuda.kv_b import absorbed_stacks
from deepseek_optimizer.backends.cuda.latent_store import CudaLatentStore
from deepseek_optimizer.backends.cuda.matrices import DeviceStack
from deepseek_optimizer.backends.cuda.store import CODES
from deepseek_optimizer.backends.reference import ops
from deepseek_optimizer.backends.reference.latent import attend_expanded
from deepseek_optimizer.backends.reference.latent import latent as reference_latent
from deepseek_optimizer.backends.reference.store import LatentStore
from deepseek_optimizer.graph.ir import LatentSpec
from deepseek_optimizer.graph.rope_rotation import KeyRotation, Pairs
from deepseek_optimizer.quant import pack, unpack

from .test_attention import on_device
from .values import ints, random

CPU = torch.device("cpu")
SCALE = 0.3
# Of the largest output. With a bf16 cache or bf16 weights, products of many rows round both operands to bf16.
BOUND = {"fp32": 5e-6, "bf16": 2**-6, "int8": 2**-6, "fp8": 2**-6}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rank", "rope"), [(40, 12), (32, 8)])
def test_rows_of_the_cache(rank, rope, interleaved):
    x, weight, table = random(5, rank + rope), random(rank, seed=1), random(5, rope, seed=2)
    exact = reference_latent(x, table, weight, 1e-6, interleaved)
    latent.latent(x, weight, table, 1e-6, interleaved, x)
    torch.testing.assert_close(x, exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16"])
def test_rows_reach_their_slots(kv_dtype):
    """Everything else in the cache stays as it is."""
    store = CudaLatentStore(LatentSpec(2, 20, 6), kv_dtype, 4, CPU)
    store.ensure(4)
    tokens, tables, at = 41, np.array([3, 1], np.int32), torch.arange(41)
    rows, slots = random(tokens, 26), (torch.from_numpy(tables)[at // 32] * 32 + at % 32).int()
    latent.store(rows, store.data, slots, store.offsets[1])
    made, nothing = store.read(1, tables, tokens)
    assert nothing is None and torch.equal(made, rows if kv_dtype == "fp32" else rows.bfloat16().float())
    assert (store.read(0, tables, tokens)[0] == 0).all()
    assert (store.data[[0, 2]] == 0).all() and int((store.data != 0).sum()) == tokens * 26


@pytest.mark.parametrize("kv_dtype", CODES)
def test_codes_of_latents_equal_those_of_the_reference(kv_dtype):
    """With a last group that is shorter and one of zeros, before and after a rotation of the keys."""
    spec, tables = LatentSpec(2, 200, 6, 8), np.array([3, 1], np.int32)
    made, exact = CudaLatentStore(spec, kv_dtype, 4, CPU), LatentStore(spec, kv_dtype, 4, CPU)
    made.ensure(4)
    rows, keys, at = random(41, 206), random(41, 8, seed=1), torch.arange(41)
    rows[4, :128] = 0
    slots = (torch.from_numpy(tables)[at // 32] * 32 + at % 32).int()
    latent.store_latents(rows, made.data, slots, made.offsets[1], 200)
    latent.store(keys, made.floats, slots, made.index_offset(1))
    exact.write(1, torch.from_numpy(tables).long(), 0, rows)
    exact.write_index(1, torch.from_numpy(tables).long(), 0, keys)
    for part in range(2):
        for own, wanted in zip(made.read(1, tables, 41), exact.read(1, tables, 41), strict=True):
            assert torch.equal(own, wanted)
        assert (made.data[[0, 2]] == 0).all() and (made.read(0, tables, 41)[0] == 0).all()
        if part == 0:
            rotation = KeyRotation(np.array([1.0, 0.3, 0.1], np.float32), Pairs(6, 0, True), Pairs(8, 0, False))
            for store in (made, exact):
                store.rotate(rotation, tables, 41, 5, 7)


def test_keys_are_rotated_in_place():
    """Rotating to and fro gives what was there; latents stay."""
    store, table = CudaLatentStore(LatentSpec(2, 20, 6), "fp32", 3, CPU), np.array([2, 0], np.int32)
    store.ensure(3)
    store.data.copy_(random(*store.data.shape))
    before = store.read(1, table, 64)[0]
    rotation = KeyRotation(np.array([1.0, 0.3, 0.1], np.float32), Pairs(6, 0, True))
    store.rotate(rotation, table, 64, 5, 7)
    moved = store.read(1, table, 64)[0]
    assert torch.equal(moved[:, :20], before[:, :20]) and not torch.allclose(moved[:, 20:], before[:, 20:])
    angles = ops.rope_table(torch.full((64,), 7), torch.tensor([1.0, 0.3, 0.1]), 1.0)
    torch.testing.assert_close(moved[:, 20:], ops.rope(before[:, 20:], angles, 1, True), rtol=1e-5, atol=1e-5)
    store.rotate(rotation, table, 64, 12, -7)
    torch.testing.assert_close(store.read(1, table, 64)[0], before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format_name", ["fp32", "int8"])
@pytest.mark.parametrize(("nope", "v_dim"), [(20, 18), (16, 32)])
def test_stacks_of_heads(nope, v_dim, format_name):
    """Values are kv_b's own tiles where its parts are whole tiles; everything else is repacked, in bf16 unless it is fp32."""
    matrix = pack(random(3 * (nope + v_dim), 40), format_name)
    keys, values = absorbed_stacks(matrix, 3, nope, v_dim)
    rows = unpack(matrix).unflatten(0, (3, -1))
    own = nope % 16 == v_dim % 16 == 0
    assert keys.shape == (3, 40, nope) and values.shape == (3, v_dim, 40)
    assert keys.format == ("fp32" if format_name == "fp32" else "bf16")
    assert values.format == (format_name if own else keys.format)
    for i in range(3):
        for stack, exact in ((keys, rows[i, :nope].T), (values, rows[i, nope:])):
            rounded = exact if stack.format != "bf16" else exact.bfloat16().float()
            assert torch.equal(unpack(stack.matrix(i)), rounded)


@pytest.mark.parametrize("tokens", [2, 7])
def test_products_of_heads(tokens):
    """Of some of the heads, and of the first columns of wider rows."""
    packed = absorbed_stacks(pack(random(5 * 38, 40), "fp32"), 5, 20, 18)[0]
    x, out = random(tokens, 5, 32, seed=1), torch.full((tokens, 3, 40), torch.nan)
    stack = DeviceStack(packed, CPU)
    heads.HeadInputs(x, stack).products(stack, 1, out)
    matrices = torch.stack([unpack(packed.matrix(i)) for i in range(1, 4)]).double()
    exact = torch.einsum("thn,hrn->thr", x[:, 1:4, :20].double(), matrices)
    assert (out - exact).abs().max() <= 3e-6 * exact.abs().max()


class Case:
    """Sequences of a step, with random latents and rotated keys of all their tokens in a cache of shuffled blocks.

    Args:
        sequences: (phase, tokens before the step, rows).
    """

    def __init__(self, sequences, head_count=3, kv_dtype="fp32", nope=20, rope=12, rank=40, v_dim=18):
        phase, context, rows = (ints(values) for values in zip(*sequences, strict=True))
        total = context + rows
        counts = -(-total // 32)
        self.store = CudaLatentStore(LatentSpec(1, rank, rope), kv_dtype, int(counts.sum()) + 2, CPU)
        self.store.ensure(self.store.num_blocks)
        self.store.data.view(torch.uint8).fill_(255)  # NaN: what no row may see must not matter, whatever it is
        blocks = iter(np.random.default_rng(0).permutation(self.store.num_blocks))
        table = np.full((len(sequences), counts.max()), -1, np.int32)
        for row, count in zip(table, counts, strict=True):
            row[:count] = [next(blocks) for _ in range(count)]
        at = np.concatenate([np.arange(c, c + r) for c, r in zip(context, rows, strict=True)])
        self.batch = StepBatch(ints(at * 0), ints(at), rows, context, phase, table, ints([]))
        for i, tokens in enumerate(total):
            token = np.arange(tokens)
            slots = torch.from_numpy(ints(table[i][token // 32] * 32 + token % 32))
            latent.store_latents(random(tokens, rank + rope, seed=10 * i + 1), self.store.data, slots, 0, rank)
        self.q = random(len(at), head_count, nope + rope)
        self.kv_b = pack(
            random(head_count * (nope + v_dim), rank, seed=3) * rank**-0.5, "fp32" if kv_dtype == "fp32" else "bf16"
        )
        self.keys, self.values = (DeviceStack(s, CPU) for s in absorbed_stacks(self.kv_b, head_count, nope, v_dim))

    def made(self, window=0, sinks=0):
        count = min(division.HEAD_ROWS, self.q.shape[1])
        at = on_device(self.batch, division.query_rows(count, division.LATENT_ROWS))
        out = torch.full((*self.q.shape[:2], self.values.rows), torch.nan)
        latent_attention.latent_attention(
            self.q, self.keys, self.values, self.store.data, 0, at.tables[0], at.phases, at.ends, out, scale=SCALE,
            window=window, sinks=sinks,
        )  # fmt: skip
        return out

    def exact(self, window=0, sinks=0, allowed=None):
        """`allowed`: bool [T, tokens], further limits what each row sees."""
        begin, outputs, rank = 0, [], self.keys.rows
        matrix = unpack(self.kv_b).double()
        for table, context, rows in zip(self.batch.block_table, self.batch.context_len, self.batch.query_len, strict=True):
            latents = self.store.read(0, table[: -(-(context + rows) // 32)], context + rows)[0].double()
            kv = (latents[:, :rank] @ matrix.T).unflatten(-1, (self.q.shape[1], -1))
            mask = ops.visible(int(rows), int(context), torch.arange(len(latents)), window, sinks)
            if allowed is not None:
                mask &= allowed[begin : begin + rows, : len(latents)]
            q = self.q[begin : begin + rows].double()
            outputs.append(attend_expanded(q, kv, latents[:, rank:], mask, SCALE))
            begin += rows
        return torch.cat(outputs)

    def check(self, window=0, sinks=0):
        exact = self.exact(window, sinks)
        error = (self.made(window, sinks).double() - exact).abs().max()
        assert error <= BOUND[self.store.kv_dtype] * exact.abs().max()


MIXED = [(DECODE, 70, 1), (DECODE, 0, 2), (PREFILL, 0, 11), (PREFILL, 33, 5)]


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("head_count", [3, 18, 1])
def test_mixed_steps(head_count, kv_dtype):
    Case(MIXED, head_count, kv_dtype).check()


@pytest.mark.parametrize("kv_dtype", CODES)
def test_codes_of_several_groups(kv_dtype):
    case = Case(MIXED, 3, kv_dtype, rank=200)
    case.check()
    case.check(window=20)


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16"])
def test_the_expanded_form(kv_dtype, monkeypatch):
    """Of a prompt whose keys are expanded in two chunks, the second of which has two of its 66 keys."""
    case = Case([(PREFILL, 7, 59)], 3, kv_dtype)
    monkeypatch.setattr(division, "_EXPANDED_BYTES", 0)
    assert division.expanded_keys(3, 38) == 64
    exact, out = case.exact(), torch.full((59, 3, 18), torch.nan)
    table = on_device(case.batch, 1).tables[0][0]
    expanded_attention.expanded_attention(case.q, case.keys, case.values, case.store.data, 0, table, 7, out, scale=SCALE)
    assert (out.double() - exact).abs().max() <= BOUND[kv_dtype] * exact.abs().max()


def test_the_form_with_fewer_products():
    """With the sizes of DeepSeek-V3: a prompt without a context expands, few rows after a long one do not."""
    sizes = {"nope": 128, "rope": 64, "v_dim": 128, "rank": 512}
    assert division.expands(1, 0, **sizes) and division.expands(4096, 0, **sizes)
    assert not division.expands(160, 100_000, **sizes) and division.expands(180, 100_000, **sizes)
    narrow = sizes | {"rank": 96}  # a latent as small as a head's key
    assert not division.expands(4096, 4096, **narrow)
    assert division.expanded_keys(128, 256) == 1024 and division.expanded_keys(1 << 20, 256) == 64


@pytest.mark.parametrize(("window", "sinks"), [(37, 0), (37, 4)])
def test_windows_and_sinks(window, sinks):
    Case([(DECODE, 200, 1), (PREFILL, 90, 9)]).check(window, sinks)


def test_long_contexts_are_divided_into_chunks():
    case = Case([(DECODE, 600, 1), (DECODE, 3, 1)], 2)
    (tiles,) = on_device(case.batch, 1).phases
    assert division.chunks_of(tiles.planned, tiles.blocks, 1) == 4  # of which the last has no block
    case.check()


def test_heads_are_divided_where_memory_is_bounded(monkeypatch):
    case = Case([(PREFILL, 5, 5)], 18)
    monkeypatch.setattr(division, "_LATENT_BYTES", 0)
    assert division.heads_at_once(5, 18, 40) == division.HEAD_ROWS
    case.check()


def test_heads_at_once():
    assert division.heads_at_once(1, 128, 512) == 128 and division.heads_at_once(4096, 128, 512) == 16
    assert division.heads_at_once(1024, 128, 512) == 64 and division.heads_at_once(10**6, 3, 512) == 3
