"""The reference backend's paged K and V."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends.reference import ReferenceBackend, int4_rows
from deepseek_optimizer.backends.reference.scaled_rows import dequantized, quantized
from deepseek_optimizer.backends.reference.store import TorchStore, store_block_bytes
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph.ir import CacheSpec, LatentSpec
from deepseek_optimizer.models import build_graph
from support.family_configs import llama

SPEC = CacheSpec(layers=2, kv_heads=3, head_dim=8)
TABLE = np.asarray([5, 0, 3], dtype=np.int32)


def filled(kv_dtype: str, tokens: int = 70) -> tuple[TorchStore, torch.Tensor, torch.Tensor]:
    """Layer 1 written in two parts; K and V as [tokens, kv_heads, head_dim], one head of zeros."""
    generator = torch.Generator().manual_seed(0)
    store = TorchStore(SPEC, kv_dtype, 8, torch.device("cpu"))
    key, value = (torch.randn(tokens, 3, 8, generator=generator) for _ in range(2))
    key[4, 1] = 0
    table = torch.from_numpy(TABLE).long()
    for begin, end in ((0, 33), (33, tokens)):
        store.write(1, table, begin, key[begin:end], value[begin:end])
    return store, key, value


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8", "fp8", "int4"])
def test_reads_what_was_written(kv_dtype: str) -> None:
    store, key, value = filled(kv_dtype)
    for read, written in zip(store.read(1, TABLE, 70), (key, value), strict=True):
        expected = written.transpose(0, 1)
        if kv_dtype == "fp32":
            assert torch.equal(read, expected)
        elif kv_dtype == "bf16":
            assert torch.equal(read, expected.bfloat16().float())
        elif kv_dtype == "int4":
            assert torch.equal(read, int4_rows.dequantized(*int4_rows.quantized(expected)))
        elif kv_dtype == "fp8":
            scale = expected.abs().amax(-1, keepdim=True) / 448
            bound = torch.maximum(expected.abs() / 16, scale / 1024)
            assert ((read - expected).abs() <= bound * (1 + 1e-5)).all() and not torch.equal(read, expected)
        else:
            half_step = expected.abs().amax(-1, keepdim=True) / 254
            assert ((read - expected).abs() <= half_step * (1 + 1e-5)).all() and not torch.equal(read, expected)


@pytest.mark.parametrize("kv_dtype", ["fp32", "int8", "fp8", "int4"])
def test_copied_block_and_released_memory(kv_dtype: str) -> None:
    store, _, _ = filled(kv_dtype)
    before = store.read(1, TABLE, 70)
    store.copy_block(0, 7)
    store.copy_block(5, 1)
    moved = store.read(1, np.asarray([1, 7, 3], dtype=np.int32), 70)
    assert all(torch.equal(a, b) for a, b in zip(moved, before, strict=True))
    store.release(2)
    assert torch.equal(store.read(1, np.asarray([1, 0], dtype=np.int32), 64)[0], before[0][:, :64])
    with pytest.raises(BackendError, match="never written"):
        store.read(1, TABLE, 70)


def test_memory_grows_with_written_blocks() -> None:
    """A store of a million blocks allocates nothing until it is used."""
    store = TorchStore(SPEC, "fp32", 1_000_000, torch.device("cpu"))
    store.write(0, torch.tensor([2]), 0, torch.ones(1, 3, 8), torch.ones(1, 3, 8))
    assert all(len(t) == 3 for t in store._data)
    with pytest.raises(BackendError, match="outside"):
        store.copy_block(0, 1_000_000)


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8", "fp8", "int4"])
def test_block_bytes_equal_the_size_of_a_block(kv_dtype: str) -> None:
    store, _, _ = filled(kv_dtype)
    tensors = (*store._data, *store._scales)
    assert store.block_bytes == store_block_bytes(SPEC, kv_dtype) == sum(t.nbytes for t in tensors) // len(store._data[0])


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8", "fp8", "int4"])
def test_layers_of_different_sizes(kv_dtype: str) -> None:
    spec = CacheSpec(layers=2, kv_heads=(3, 1), head_dim=(8, 20))
    assert spec.heads == ((3, 8), (1, 20)) and spec.elements_per_token == 2 * (24 + 20)
    store, table = TorchStore(spec, kv_dtype, 8, torch.device("cpu")), torch.from_numpy(TABLE).long()
    written = [torch.randn(40, *heads, generator=torch.Generator().manual_seed(1)) for heads in spec.heads]
    for layer, rows in enumerate(written):
        store.write(layer, table, 0, rows, rows + 1)
    for layer, rows in enumerate(written):
        key, value = store.read(layer, TABLE, 40)
        within = {"rtol": 0.01, "atol": {"int4": 0.7, "fp8": 0.2}.get(kv_dtype, 0.03)}
        torch.testing.assert_close(key, rows.transpose(0, 1), **within)
        torch.testing.assert_close(value, rows.transpose(0, 1) + 1, **within)
    assert store.saved_bytes == store_block_bytes(spec, kv_dtype)
    assert store_block_bytes(spec, kv_dtype) == sum(store_block_bytes(CacheSpec(1, *heads), kv_dtype) for heads in spec.heads)


@pytest.mark.parametrize("spec", [CacheSpec(4, 3, 64), CacheSpec(4, 8, 128), LatentSpec(4, 512, 64)])
def test_int4_takes_less_than_a_third_of_bf16(spec: CacheSpec | LatentSpec) -> None:
    """Heads of SmolLM2 and of R1's distillations, and the latents of DeepSeek-V2 and V3."""
    assert store_block_bytes(spec, "int4") <= 0.3 * store_block_bytes(spec, "bf16")


def test_fp8_keeps_every_number_of_e4m3() -> None:
    """Those of a row whose largest is 448, of any magnitude; and NaN in rows with a NaN or an infinity."""
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()
    numbers = torch.where(numbers.isfinite(), numbers, 0.0)
    for factor in (1.0, 2.0**-30, 2.0**100):
        made, scale = quantized(numbers * factor, "fp8")
        assert scale == factor and torch.equal(dequantized(made, scale, "fp8"), numbers * factor)
    tiny = torch.tensor([2.0**-149 * 600, 0.0])  # the scale is rounded down to the smallest number above 0
    assert dequantized(*quantized(tiny, "fp8"), "fp8").isfinite().all()
    for value in (torch.nan, torch.inf):
        assert dequantized(*quantized(torch.tensor([1.0, value]), "fp8"), "fp8").isnan().any()


def test_short_tables_and_unknown_dtypes_are_rejected() -> None:
    store, _, _ = filled("fp32")
    with pytest.raises(BackendError, match="too few for"):
        store.read(1, TABLE[:2], 70)
    with pytest.raises(BackendError, match="int3.*bf16"):
        ReferenceBackend().new_store(build_graph(llama()), "int3", 4)
