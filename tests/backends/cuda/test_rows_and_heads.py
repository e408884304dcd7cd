"""Norms, RoPE, cache writes, selected rows and element-wise ops equal the reference's functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer.backends.cuda import gates
from deepseek_optimizer.backends.cuda.kernels import elementwise, norm, rope, rows
from deepseek_optimizer.backends.cuda.store import CODES, CudaStore
from deepseek_optimizer.backends.reference import ops
from deepseek_optimizer.backends.reference.scaled_rows import dequantized, quantized
from deepseek_optimizer.backends.reference.store import TorchStore
from deepseek_optimizer.graph.ir import CacheSpec
from deepseek_optimizer.graph.rope_rotation import KeyRotation, Pairs

from .values import random

CPU = torch.device("cpu")


def close(made: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(made, exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("count", "width"), [(1, 7), (37, 72), (3, 2500)])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norms(count, width, unit_offset):
    x, delta, weight = random(count, width), random(count, width, seed=1), random(width, seed=2)
    out, total = torch.empty_like(x), torch.empty_like(x)
    norm.rms_norm(x, weight, 1e-5, out, unit_offset=unit_offset)
    close(out, ops.rms_norm(x, weight, 1e-5, unit_offset))
    norm.rms_norm(x, weight, 1e-5, out, unit_offset=unit_offset, delta=delta, total=total)
    assert torch.equal(total, x + delta)
    close(out, ops.rms_norm(x + delta, weight, 1e-5, unit_offset))


@pytest.mark.parametrize("biased", [False, True])
def test_layer_norms_in_place(biased):
    x, weight, bias = random(9, 70) + 3, random(70, seed=1), random(70, seed=2) if biased else None
    exact = ops.layer_norm(x, weight, bias, 1e-6)
    norm.layer_norm(x, weight, bias, 1e-6, x)
    torch.testing.assert_close(x, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_norms_of_heads_in_place(weighted):
    x, weight = random(9, 5 * 12), random(12, seed=1) if weighted else None
    exact = ops.head_norm(x, weight, 1e-6, 5)
    norm.rms_norm(x, weight, 1e-6, x, heads=5)
    close(x, exact)


@pytest.mark.parametrize("scaling", [1.0, 1.25])
def test_angles_of_large_positions_are_exact(scaling):
    positions, frequencies = torch.tensor([0, 1, 77, 131071, 1_000_003], dtype=torch.int32), random(2, 9, seed=3).abs()
    which, out = torch.tensor([0, 1, 1, 0, 1], dtype=torch.int32), torch.empty(5, 18)
    rope.rope_table(positions, which, frequencies, scaling, out)
    close(out, ops.rope_table(positions.long(), frequencies[which.long()], scaling))


def test_angles_of_positions_on_axes():
    positions, axes = torch.tensor([[0, 5, 7], [1, 2, 3], [9, 8, 70000]], dtype=torch.int32), [0, 1, 2, 1, 0]
    frequencies, which, out = random(1, 5, seed=3).abs(), torch.zeros(3, dtype=torch.int32), torch.empty(3, 10)
    rope.rope_table(positions, which, frequencies, 1.5, out, torch.tensor(axes, dtype=torch.int32))
    close(out, ops.rope_table(positions.T[:, axes].long(), frequencies, 1.5))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rot", "offset"), [(12, 0), (8, 0), (6, 5)])
def test_rope_in_place(rot, offset, interleaved):
    x, table = random(11, 3 * 12), random(11, rot, seed=1)
    exact = ops.rope(x, table, 3, interleaved, offset)
    rope.rope(x, table, 3, interleaved, x, offset)
    close(x, exact)


def test_columns():
    x, out = random(11, 3 * 50), torch.full((11, 3 * 20), torch.nan)
    rows.columns(x, out, groups=3, begin=7, end=27)
    assert torch.equal(out, x.unflatten(1, (3, 50))[..., 7:27].flatten(1))


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("rotated", [False, True])
def test_keys_and_values_reach_their_slots(rotated, kv_dtype):
    """Of two layers of different sizes; everything else in the cache stays as it is."""
    store = CudaStore(CacheSpec(2, (3, 2), (8, 12)), kv_dtype, 4, CPU)
    store.ensure(4)
    tokens, tables = 41, np.array([3, 1], np.int32)
    q, k, v, table = random(tokens, 4 * 12), random(tokens, 24, seed=1), random(tokens, 24, seed=2), random(tokens, 12, seed=3)
    at = torch.arange(tokens)
    slots = (torch.from_numpy(tables)[at // 32] * 32 + at % 32).int()
    y = torch.empty_like(q)
    given = (q, k, v, table, y) if rotated else (None, k, v, None, None)
    rope.rope_cache(*given, store.data, slots, store.offsets[1], heads=4, kv_heads=2)
    keys = ops.rope(k, table, 2, False) if rotated else k
    if rotated:
        close(y, ops.rope(q, table, 4, False))
    for made, exact in zip(store.read(1, tables, tokens), (keys, v), strict=True):
        rows_of_heads = exact.unflatten(-1, (2, 12)).transpose(0, 1)
        if kv_dtype == "fp32":
            close(made, rows_of_heads)
        elif kv_dtype in CODES:  # as the reference rounds them; the last bits of the rotation may move a code by one
            codes, scales = quantized(rows_of_heads, kv_dtype)
            rounded = dequantized(codes, scales, kv_dtype)
            step = scales[..., None].expand_as(made) if kv_dtype == "int8" else rounded.abs() / 8 + scales[..., None] / 512
            assert ((made - rounded).abs() <= step * rotated * 1.001 + 1e-6).all()
        else:  # rounded to nearest, up to the last bits of the rotation
            torch.testing.assert_close(made, rows_of_heads.bfloat16().float(), rtol=2**-8 if rotated else 0, atol=1e-6)
    assert all((part == 0).all() for part in store.read(0, tables, tokens))
    assert (store.data[[0, 2]] == 0).all()
    assert kv_dtype in CODES or int((store.data != 0).sum()) == tokens * 48


@pytest.mark.parametrize("kv_dtype", CODES)
def test_codes_of_keys_are_rotated_and_rounded_as_in_the_reference(kv_dtype):
    """And rows of zeros have codes of zero."""
    spec, table = CacheSpec(1, 2, 12), np.array([2, 0], np.int32)
    made, exact = CudaStore(spec, kv_dtype, 4, CPU), TorchStore(spec, kv_dtype, 4, CPU)
    made.ensure(4)
    k, v = random(41, 2, 12), random(41, 2, 12, seed=1)
    k[3] = 0
    at = torch.arange(41)
    slots = (torch.from_numpy(table)[at // 32] * 32 + at % 32).int()
    rope.rope_cache(None, k.flatten(1), v.flatten(1), None, None, made.data, slots, 0, heads=0, kv_heads=2)
    exact.write(0, torch.from_numpy(table).long(), 0, k, v)
    rotation = KeyRotation(np.array([0.5, 0.25, 0.125], np.float32), Pairs(6, 0, False))
    for store in (made, exact):
        store.rotate(rotation, table, 41, 64, -32)
    for ours, theirs in zip(made.read(0, table, 41), exact.read(0, table, 41), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_selected_rows():
    x, index, out = random(30, 150), torch.tensor([0, 3, 7, 8, 9, 11, 12, 20, 21, 29], dtype=torch.int32), torch.empty(10, 150)
    rows.select_rows(index, x, out)
    assert torch.equal(out, x[index.long()])
    rows.select_rows(index[:0], x, out[:0])


def test_rows_side_by_side():
    a, b = random(19, 70), random(19, 30, seed=1)
    out = torch.full((19, 100), torch.nan)
    rows.concat(a, b, out)
    assert torch.equal(out, ops.concat(a, b))


@pytest.mark.parametrize(("groups", "begin", "end"), [(1, 3, 70), (5, 2, 9), (14, 4, 5)])
def test_columns_of_rows(groups, begin, end):
    x = random(19, 70)
    out = torch.full((19, groups * (end - begin)), torch.nan)
    rows.columns(x, out, groups, begin, end)
    assert torch.equal(out, ops.columns(x, groups, begin, end))


@pytest.mark.parametrize("op", ["add", "multiply", "swiglu", "geglu"])
def test_pairs_of_values(op):
    a, b = random(7, 300), random(7, 300, seed=1)
    exact = ops.FUNCTIONS[op](a, b)
    gate = gates.OF_OPS.get(op)
    elementwise.apply(*((op, a, b, a) if gate is None else ("gate", a, b, a, gate)))
    close(a, exact)


def test_gates_with_limits():
    a, b, out = random(7, 300) * 9, random(7, 300, seed=1) * 9, torch.empty(7, 300)
    for options in ({"limit": 7.0, "alpha": 1.702, "raised": True}, {"limit": 1.5, "alpha": 1.0, "raised": False}):
        elementwise.apply("gate", a, b, out, gates.gate_of(options))
        close(out, ops.clamped_swiglu(a, b, **options))


def test_functions_of_elements():
    x, out = random(5, 300) * 4, torch.empty(5, 300)
    elementwise.each("scale", x, out, 0.3)
    assert torch.equal(out, x * 0.3)
    elementwise.each("scale", x, out, 3.0, 5.0)
    torch.testing.assert_close(out, 5 * torch.tanh(x * 3 / 5), rtol=1e-6, atol=2e-6)
    elementwise.each("scale_by", x, out, factor=torch.tensor([1.7]))
    assert torch.equal(out, x * 1.7)
    elementwise.each("gelu", x, out)
    torch.testing.assert_close(out, ops.gelu(x), rtol=2e-6, atol=2e-6)
    elementwise.each("gelu_erf", x, out)
    torch.testing.assert_close(out, ops.gelu_erf(x), rtol=2e-6, atol=2e-6)
    elementwise.each("relu", x, out)
    assert torch.equal(out, ops.relu(x))
    elementwise.each("clamp", x, out, factor=torch.tensor(-1.5), limit=torch.tensor(0.5))
    assert torch.equal(out, x.clamp(-1.5, 0.5))
    positions = torch.tensor([0, 7, 8, 100, 4095], dtype=torch.int32)
    elementwise.position_scale(x, positions, out, 0.4, 8, 1)
    close(out, ops.position_scale(x, positions.long(), 0.4, 8, 1))
