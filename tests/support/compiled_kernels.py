"""Compiles the kernels of backend `cuda` for a card that need not be there, as a program:

    python -m support.compiled_kernels 90         # prints JSON: by kernel registers, stack, shared and local memory
    python -m support.compiled_kernels 90 mxfp4   # of the launches whose names contain this
    python -m support.compiled_kernels constants  # compiles nothing; by kernel, the constants that it is launched with

The functions that launch kernels are called with tensors of a model's shapes and without data. Instead of being launched, the
kernels are compiled with the same constants, and with the facts about arguments that Triton uses: divisible by 16, or 1.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

META = torch.device("meta")
HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 4096, 14336, 32, 8, 128  # of Llama 3.1 8B


@dataclass(frozen=True)
class Mixture:
    """Sizes of a layer's experts."""

    hidden: int
    inner: int
    experts: int
    top_k: int


V3, V2_LITE, GPT_OSS = Mixture(7168, 2048, 256, 8), Mixture(2048, 1408, 64, 6), Mixture(2880, 2880, 128, 4)
NOPE, ROPE, RANK, V_DIM = 128, 64, 512, 128  # of both
V4_HEADS, V4_HEAD, STREAMS = 128, 512, 4  # of DeepSeek-V4
CODES = {"int8": torch.int8, "fp8": torch.uint8}  # of caches
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def launches(capability: int = 100) -> dict[str, Callable[[], None]]:
    """Calls of the functions that launch kernels, by a name for each; a call may launch several kernels.

    Args:
        capability: what they need at most; those of products in FP8 need 89.
    """
    from deepseek_optimizer.backends.cuda.division import Tiles
    from deepseek_optimizer.backends.cuda.gates import GELU, SILU, Gate
    from deepseek_optimizer.backends.cuda.kernels import (
        adapters,
        attention,
        blocks,
        compress,
        compressed_attention,
        elementwise,
        expanded_attention,
        experts,
        grids,
        heads,
        indexer,
        latent,
        latent_attention,
        linear,
        norm,
        recurrent,
        rope,
        routing,
        rows,
        scaled_product,
        streams,
    )
    from deepseek_optimizer.backends.cuda.layouts import LAYOUTS
    from deepseek_optimizer.backends.cuda.matrices import DeviceMatrix, DeviceStack
    from deepseek_optimizer.backends.cuda.step import Runs
    from deepseek_optimizer.quant.packed import PackedMatrix, PackedStack

    def matrix(format_name: str, outputs: int, columns: int, coded: bool = False) -> DeviceMatrix:
        tile = LAYOUTS[format_name].tile_words * 4
        data = empty(-(-outputs // 16), -(-columns // 32), tile, dtype=torch.uint8)
        return DeviceMatrix(PackedMatrix(format_name, outputs, columns, data), META, coded)

    def product(format_name: str, count: int, biased: bool = False, coded: bool = False) -> Callable[[], None]:
        weights, bias = matrix(format_name, HIDDEN, HIDDEN, coded), empty(HIDDEN) if biased else None
        return lambda: linear.linear(empty(count, HIDDEN), weights, bias, empty(count, HIDDEN))

    def gated(format_name: str, count: int, gate: Gate = SILU, inner: int = INNER, coded: bool = False) -> Callable[[], None]:
        """With other gates than SwiGLU also with biases."""
        first = up = matrix(format_name, inner, HIDDEN, coded)
        biases = (None, None) if gate is SILU else (empty(inner), empty(inner))
        return lambda: linear.gate_up(empty(count, HIDDEN), first, up, biases, empty(count, inner), gate)

    def attend(kv_dtype: torch.dtype, tiles: int, block_q: int, blocks: int, **more: Any) -> Callable[[], None]:
        fields = Tiles(empty(tiles, 5, dtype=torch.int32), block_q, blocks)
        sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "scale": 0.088, **more}
        head = sizes.pop("head", HEAD)
        q = empty(tiles * block_q, sizes["heads"] * head)
        cache = empty(999, 32 * 32 * 2 * sizes["kv_heads"] * head, dtype=kv_dtype)
        tables, ends = empty(1, 256, dtype=torch.int32), empty(tiles * block_q, dtype=torch.int32)
        return lambda: attention.attention(q, cache, 0, tables, fields, ends, q, **sizes)

    def chosen_blocks(dtype: torch.dtype) -> Callable[[], None]:
        """With the summaries of blocks."""
        kept, pages = empty(999, 32 * 32 * (2 * KV_HEADS * (HEAD + 8)), dtype=dtype), empty(1, 4096, dtype=torch.int32)
        sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "blocks": 64, "sinks": 4, "window": 1024}

        def launch() -> None:
            blocks.summarize(kept, ints, 0, KV_HEADS, HEAD)
            blocks.choose(x, kept, 0, pages, ints, ints, empty(64, KV_HEADS * 64), **sizes)

        return launch

    def adapt(dtype: torch.dtype, rank: int) -> Callable[[], None]:
        """A LoRA adapter of a product of Llama 3.1 8B."""
        order, fields = empty(64, dtype=torch.int32), empty(8, 3, dtype=torch.int32)
        addresses, h, narrow = empty(8, 224, 3, dtype=torch.int64), empty(64, rank), dtype == torch.bfloat16

        def launch() -> None:
            adapters.shrink(x, order, fields, addresses, 3, narrow, h)
            adapters.expand(h, order, fields, addresses, 3, narrow, x)

        return launch

    def attend_in_step(narrow: bool, head_count: int, head: int, window: int = 0) -> Callable[[], None]:
        """Attention of an encoder or a vision tower, to the rows of the step."""
        fields, ends = Tiles(empty(64, 5, dtype=torch.int32), 64, 0), empty(4096, dtype=torch.int32)
        q = empty(4096, head_count * head)
        sizes = {"heads": head_count, "kv_heads": head_count, "scale": 0.125, "window": window, "narrow": narrow}
        return lambda: attention.step_attention(q, q, q, fields, ends, q, **sizes)

    def stack(format_name: str, count: int, outputs: int, columns: int, coded: bool = False) -> DeviceStack:
        tile = LAYOUTS[format_name].tile_words * 4
        data = empty(count, -(-outputs // 16), -(-columns // 32), tile, dtype=torch.uint8)
        return DeviceStack(PackedStack(format_name, count, outputs, columns, data), META, coded)

    def mixture(
        format_name: str, tokens: int, sizes: Mixture, gated: bool = True, gate: Gate = SILU, weighed: bool = False,
        coded: bool = False,
    ) -> Callable[[], None]:  # fmt: skip
        """Gate and up of the chosen experts, or their down; with other gates than SwiGLU also with biases."""
        gate_up = stack(format_name, 2 * sizes.experts, sizes.inner, sizes.hidden, coded)
        down = stack(format_name, sizes.experts, sizes.hidden, sizes.inner, coded)
        x, routes = empty(tokens, sizes.hidden), empty(tokens, 2 * sizes.top_k)
        hidden = empty(tokens * sizes.top_k, sizes.inner)
        biases = None if gate is SILU else empty(sizes.experts, 2, sizes.inner)

        def launch() -> None:
            tiles = experts.group_for(routes, sizes.experts, gate_up)
            if gated:
                experts.gate_up(x, routes, tiles, gate_up, hidden, biases, gate, weighed)
            else:
                experts.down(hidden, routes, tiles, down, x, biases, weighed)

        return launch

    def attend_latents(
        kv_dtype: torch.dtype, tiles: int, block_q: int, blocks: int, head_count: int, top_k: int = 0
    ) -> Callable[[], None]:
        """With the products of heads before and after it."""
        fields, rows = Tiles(empty(tiles, 5, dtype=torch.int32), block_q, blocks), tiles * block_q
        format_name = "fp32" if kv_dtype == torch.float32 else "bf16"
        keys, values = stack(format_name, head_count, RANK, NOPE), stack(format_name, head_count, V_DIM, RANK)
        q, out = empty(rows, head_count, NOPE + ROPE), empty(rows, head_count, V_DIM)
        cache, tables = empty(999, 61 * 32 * (RANK + ROPE), dtype=kv_dtype), empty(1, 256, dtype=torch.int32)
        ends, chosen = empty(rows, dtype=torch.int32), empty(rows, top_k) if top_k else None
        return lambda: latent_attention.latent_attention(
            q, keys, values, cache, 32 * (RANK + ROPE), tables, [fields], ends, out, scale=0.1, chosen=chosen
        )

    def rope_into(dtype: torch.dtype) -> Callable[[], None]:
        codes = cache.view(dtype)
        return lambda: rope.rope_cache(x, key, key, table, x, codes, ints, 0, heads=HEADS, kv_heads=KV_HEADS)

    def write_latents(dtype: torch.dtype) -> Callable[[], None]:
        codes = empty(99, 61 * 32 * (RANK + 2 * ROPE + 16), dtype=dtype)
        return lambda: latent.store_latents(latents, codes, ints, 0, RANK)

    def delta(k_heads: int, channels: bool) -> Callable[[], None]:
        """32 heads of 128 x 128, those of Qwen3-Next and Kimi Linear."""
        width, gates = 2 * k_heads * 128 + 32 * 128, 32 * 128 if channels else 32
        return lambda: recurrent.delta_rule(
            empty(64, width), empty(64, gates), empty(64, 32), empty(32), empty(gates), states, 0, runs, empty(64, 4096),
            heads=32, k_heads=k_heads, k_dim=128, v_dim=128, channels=channels,
        )  # fmt: skip

    def expand(kv_dtype: torch.dtype) -> Callable[[], None]:
        """A long prompt of V3."""
        format_name = "fp32" if kv_dtype == torch.float32 else "bf16"
        keys, values = stack(format_name, 128, RANK, NOPE), stack(format_name, 128, V_DIM, RANK)
        q, out, pages = empty(512, 128, NOPE + ROPE), empty(512, 128, V_DIM), empty(256, dtype=torch.int32)
        cache = empty(999, 61 * 32 * (RANK + ROPE), dtype=kv_dtype)
        return lambda: expanded_attention.expanded_attention(q, keys, values, cache, 0, pages, 512, out, scale=0.1)

    def attend_rows(
        kv_dtype: torch.dtype, tiles: int, block_q: int, blocks: int, every: int, top_k: int = 0
    ) -> Callable[[], None]:
        """V4's attention to a window and entries."""
        fields, count = Tiles(empty(tiles, 5, dtype=torch.int32), block_q, blocks), tiles * block_q
        q, cache = empty(count, V4_HEADS, V4_HEAD), empty(999, 64 * V4_HEAD * 32, dtype=kv_dtype)
        pages, chosen = empty(1, 256, dtype=torch.int32), empty(count, top_k) if top_k else None
        return lambda: compressed_attention.attention(
            q, cache, 0, pages, (512, pages, every) if every else None, fields, empty(V4_HEADS), q, scale=0.1, window=128,
            chosen=chosen,
        )  # fmt: skip

    def entries(every: int, overlap: bool, width: int) -> Callable[[], None]:
        bias, cache = empty(every, width * (2 if overlap else 1)), empty(999, 64 * V4_HEAD * 32, dtype=torch.bfloat16)
        pages = empty(1, 256, dtype=torch.int32)
        return lambda: compress.compress(
            cache, bias, empty(width), empty(1, ROPE // 2), ints, ints, pages, pages, 0, 512, overlap=overlap, eps=1e-6,
            scaling=1.0, first_rotated=width - ROPE,
        )  # fmt: skip

    def grouped(format_name: str, count: int) -> Callable[[], None]:
        """V4's output products."""
        matrices, x = stack(format_name, 16, 1024, 4096), empty(count, 16, 4096)
        return lambda: heads.HeadInputs(x, matrices).products(matrices, 0, empty(count, 16, 1024))

    def mix(width: int) -> Callable[[], None]:
        return lambda: streams.weights(empty(64, width), empty(width), empty(3), empty(64, width), STREAMS, 20, 1e-6)

    latents, routed = empty(64, RANK + ROPE), empty(64, 2 * V3.top_k)
    routing_of_v3 = {
        "top_k": 8, "groups": 8, "top_groups": 4, "scoring": "sigmoid", "group_score": "top2", "normalize": True, "scale": 2.5,
    }  # fmt: skip
    plain = routing_of_v3 | {"groups": 1, "top_groups": 1, "scoring": "softmax", "group_score": "max"}
    by_table = plain | {"scoring": "sqrtsoftplus", "by_table": (empty(64, dtype=torch.int32), empty(999, 8, dtype=torch.int32))}
    ints, x, key = empty(64, dtype=torch.int32), empty(64, HIDDEN), empty(64, KV_HEADS * HEAD)
    states, runs = empty(8, 1 << 20), Runs(*(empty(*shape, dtype=torch.int32) for shape in ((8, 5), (64,), (8, 2))))
    cache, table = empty(99, 32 * 2 * KV_HEADS * HEAD, dtype=torch.bfloat16), empty(64, HEAD)
    gpt_oss = {"heads": 64, "kv_heads": 8, "head": 64, "learned": empty(64), "window": 128}
    gemma_3 = {"heads": 16, "kv_heads": 8, "head": 256, "window": 1024}
    gemma_4 = {"heads": 32, "kv_heads": 4, "head": 512}
    other_heads = {
        "whole prompts": attend(torch.bfloat16, 64, 16, 0, causal=True),
        "gpt-oss, prefill": attend(torch.bfloat16, 64, 8, 0, **gpt_oss),
        "gpt-oss, decoding": attend(torch.bfloat16, 1, 1, 128, **gpt_oss),
        "Gemma 3, prefill": attend(torch.bfloat16, 64, 32, 0, **gemma_3),
        "Gemma 3, decoding": attend(torch.bfloat16, 1, 1, 128, **gemma_3),
        "Gemma 4, prefill": attend(torch.bfloat16, 64, 8, 0, **gemma_4),
        "Gemma 4, decoding": attend(torch.bfloat16, 1, 1, 128, **gemma_4),
        **{f"Gemma 4, decoding in {name}": attend(dtype, 1, 1, 128, **gemma_4) for name, dtype in CODES.items()},
    }
    coded_rows = {
        "rows in FP8": product("fp8", 512, coded=True),
        "rows in FP8, 16 of them": product("fp8", 16, coded=True),
        "rows in FP8, gated": gated("fp8", 512, coded=True),
        "rows in FP8, experts": mixture("fp8", 4096, V3, coded=True),
        "rows in FP8, experts, down": mixture("fp8", 4096, V3, gated=False, coded=True),
    }
    return {
        **(coded_rows if capability >= 89 else {}),
        "matrix in rows": lambda: scaled_product.rows_of(matrix("fp8", HIDDEN, HIDDEN, True)),
        **{f"vector {name}": product(name, 1) for name in LAYOUTS},
        "vector int4 of 4 rows, gated": gated("int4", 4),
        **{f"tile {name}": product(name, 512) for name in LAYOUTS},
        **{f"tile {name} of 16 rows, gated": gated(name, 16) for name in ("bf16", "int4")},
        **{f"tile {name}, gated": gated(name, 512) for name in ("bf16", "int8", "int4")},
        "attention, prefill": attend(torch.bfloat16, 64, 16, 0),
        "attention, decoding": attend(torch.bfloat16, 1, 1, 128),
        "attention, decoding with a sink": attend(torch.bfloat16, 1, 1, 128, learned=empty(HEADS), window=128),
        "attention, prefill with a softcap": attend(torch.bfloat16, 64, 16, 0, softcap=50.0),
        "attention, prefill in chunks": attend(torch.bfloat16, 64, 16, 0, window=8192, chunked=True),
        "attention, decoding in chunks": attend(torch.bfloat16, 1, 1, 128, window=8192, chunked=True),
        **{f"attention, prefill in {name}": attend(dtype, 64, 16, 0) for name, dtype in CODES.items()},
        **{f"attention, decoding in {name}": attend(dtype, 1, 1, 128) for name, dtype in CODES.items()},
        **{f"rope and {name} cache": rope_into(dtype) for name, dtype in CODES.items()},
        **{f"latents, prefill in {name}": attend_latents(dtype, 64, 2, 0, 128) for name, dtype in CODES.items()},
        **{f"latents, decoding in {name}": attend_latents(dtype, 1, 1, 128, 128) for name, dtype in CODES.items()},
        **{f"latent write in {name}": write_latents(dtype) for name, dtype in CODES.items()},
        "short convolution": lambda: recurrent.short_conv(
            empty(64, 8192), states, 0, runs, empty(8192, 1, 4), None, True, empty(64, 8192)
        ),
        "delta rule": delta(16, False),
        "delta rule of channels": delta(32, True),
        "attention in a step": attend_in_step(True, 16, 64),
        "attention in a step, windows": attend_in_step(True, 12, 64, 64),
        "attention in a step, 80 elements": attend_in_step(True, 16, 80),
        "attention in a step, 256 elements": attend_in_step(True, 12, 192),
        "attention in a step in fp32": attend_in_step(False, 16, 64),
        "attention in a step in fp32, 256 elements": attend_in_step(False, 12, 192),
        **{f"adapters in {name}": adapt(dtype, 16) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))},
        "adapters in fp32, rank 64": adapt(torch.float32, 64),
        **{f"chosen blocks in {name}": chosen_blocks(dtype) for name, dtype in (("bf16", torch.bfloat16), *CODES.items())},
        "attention, decoding to chosen blocks": attend(torch.bfloat16, 1, 1, 128, chosen=empty(1, KV_HEADS * 64)),
        "attention, prefill to chosen blocks": attend(torch.bfloat16, 64, 1, 0, chosen=empty(64, KV_HEADS * 64)),
        "queries in a grid": lambda: grids.grid_queries(
            empty(4096, 768), empty(3, 4096, dtype=torch.int32), *(empty(127, 64) for _ in "ij"), empty(4096, 12 * 192), 12, 0.1
        ),
        "keys in a grid": lambda: grids.grid_keys(
            empty(4096, 768), empty(3, 4096, dtype=torch.int32), empty(4096, 12 * 192), 12, 64, 64
        ),
        "padding in a grid": lambda: grids.zero_padding(x, ints, x),
        "short convolution with a bias": lambda: recurrent.short_conv(
            empty(64, 2048), states, 0, runs, empty(2048, 1, 3), empty(2048), False, empty(64, 2048)
        ),
        "vector int4 with a bias": product("int4", 1, True),
        "vector int4 of few rows, gelu": gated("int4", 1, GELU, 1024),
        "tile int4 with a bias": product("int4", 512, True),
        "tile int4, gelu": gated("int4", 512, GELU),
        **{f"attention of {what}": launch for what, launch in other_heads.items()},
        "attention, decoding in fp32": attend(torch.float32, 1, 1, 128),
        "attention, prefill in fp32": attend(torch.float32, 64, 16, 0),
        **{f"experts {name}": mixture(name, 1, V3) for name in LAYOUTS},
        **{f"experts {name}, grouped": mixture(name, 4096, V3) for name in LAYOUTS},
        "experts mxfp4 of gpt-oss": mixture("mxfp4", 1, GPT_OSS, gate=Gate("clamped", 7.0, 1.702, True)),
        "experts mxfp4 of gpt-oss, grouped": mixture("mxfp4", 4096, GPT_OSS, gate=Gate("clamped", 7.0, 1.702, True)),
        "experts bf16, weighed": mixture("bf16", 1, V3, weighed=True),
        "experts bf16, weighed, grouped": mixture("bf16", 4096, V3, weighed=True),
        "experts int4, down": mixture("int4", 1, V3, gated=False),
        "experts int4, down, grouped": mixture("int4", 4096, V3, gated=False),
        "experts int4, down, weighed": mixture("int4", 1, V3, gated=False, weighed=True),
        "experts int4 of V2-Lite, grouped": mixture("int4", 64, V2_LITE),
        "routes": lambda: routing.route(empty(64, V3.experts), empty(V3.experts), None, routed, **routing_of_v3),
        "routes without groups": lambda: routing.route(empty(64, 512), None, None, routed, **plain),
        "routes with factors": lambda: routing.route(
            empty(64, 512), None, empty(512), routed, **plain | {"normalize": False}
        ),
        "sigmoid gate": lambda: elementwise.sigmoid_gate(x, empty(64, 1), x),
        "sigmoid gate of elements": lambda: elementwise.sigmoid_gate(x, x, x),
        "latents, prefill": attend_latents(torch.bfloat16, 64, 2, 0, 128),
        "latents, prefill in fp32": attend_latents(torch.float32, 64, 2, 0, 128),
        "latents, decoding": attend_latents(torch.bfloat16, 1, 1, 128, 128),
        "latents, decoding of V2-Lite": attend_latents(torch.bfloat16, 1, 1, 256, 16),
        "latents, decoding in fp32": attend_latents(torch.float32, 1, 1, 128, 128),
        "chosen latents, decoding": attend_latents(torch.bfloat16, 1, 1, 256, 128, 2048),
        "indexer": lambda: indexer.choose(
            empty(64, 64 * 128), empty(64, 64), empty(999, 61 * 32 * (RANK + ROPE + 128), dtype=torch.bfloat16), 0,
            empty(1, 4096, dtype=torch.int32), ints, ints, empty(64, 2048), 0.1,
        ),
        "indexer in fp32": lambda: indexer.choose(
            empty(64, 64 * 128), empty(64, 64), empty(999, 61 * 32 * (RANK + ROPE + 128)), 0,
            empty(1, 4096, dtype=torch.int32), ints, ints, empty(64, 2048), 0.1,
        ),
        "expanded latents": expand(torch.bfloat16),
        "expanded latents in fp32": expand(torch.float32),
        "compressed attention, prefill": attend_rows(torch.bfloat16, 64, 2, 0, 128),
        "compressed attention, prefill in fp32": attend_rows(torch.float32, 64, 2, 0, 128),
        "compressed attention, decoding": attend_rows(torch.bfloat16, 1, 1, 256, 128),
        "compressed attention, decoding in fp32": attend_rows(torch.float32, 1, 1, 256, 128),
        "compressed attention to chosen entries": attend_rows(torch.bfloat16, 1, 1, 256, 4, 512),
        "attention to a window of rows": attend_rows(torch.bfloat16, 1, 1, 256, 0),
        "entries of 4 tokens": entries(4, True, V4_HEAD),
        "entries of 128 tokens": entries(128, False, V4_HEAD),
        "entries of an indexer": entries(4, True, 128),
        "indexer of entries": lambda: indexer.choose(
            empty(64, 64 * 128), empty(64, 64), empty(999, 64 * V4_HEAD * 32, dtype=torch.bfloat16), 0,
            empty(1, 4096, dtype=torch.int32), ints, ints, empty(64, 512), 0.1, 4,
        ),
        **{f"grouped product {name}": grouped(name, 1) for name in ("bf16", "fp8", "int4", "mxfp4")},
        **{f"grouped product {name} of 64 rows": grouped(name, 64) for name in ("bf16", "fp8", "int4", "mxfp4")},
        "weights of streams": mix((2 + STREAMS) * STREAMS),
        "weights of streams, collapsing": mix(STREAMS),
        "streams collapsed": lambda: streams.collapse(empty(64, STREAMS * HIDDEN), empty(64, 24), x),
        "streams expanded": lambda: streams.expand(empty(64, STREAMS * HIDDEN), empty(64, 24), x, empty(64, STREAMS * HIDDEN)),
        "routes by table": lambda: routing.route(empty(64, 256), None, None, routed, **by_table),
        "columns": lambda: rows.columns(empty(64, 2 * HIDDEN), x, 16, 8, 264),
        "gelu with erf": lambda: elementwise.each("gelu_erf", x, x),
        "gelu": lambda: elementwise.each("gelu", x, x),
        "relu": lambda: elementwise.each("relu", x, x),
        "scale by": lambda: elementwise.each("scale_by", x, x, factor=empty(1)),
        **{op: partial(elementwise.apply, op, x, x, x) for op in ("add", "multiply")},
        "geglu": lambda: elementwise.apply("gate", x, x, x, GELU),
        "clamp": lambda: elementwise.each("clamp", x, x, factor=empty(1), limit=empty(1)),
        "layer norm": lambda: norm.layer_norm(x, empty(HIDDEN), empty(HIDDEN), 1e-6, x),
        "layer norm without a bias": lambda: norm.layer_norm(x, empty(HIDDEN), None, 1e-6, x),
        "latent without pairs": lambda: latent.latent(latents, empty(RANK), empty(64, ROPE), 1e-6, False, latents),
        "latent": lambda: latent.latent(latents, empty(RANK), empty(64, ROPE), 1e-6, True, latents),
        "latent write": lambda: latent.store(latents, empty(99, 32 * (RANK + ROPE), dtype=torch.bfloat16), ints, 0),
        **{f"embedding {name}": partial(rows.embedding, ints, matrix(name, 128256, HIDDEN), 1.0, x) for name in LAYOUTS},
        "concat": lambda: rows.concat(x, x, empty(64, 2 * HIDDEN)),
        "rows": lambda: rows.select_rows(ints, x, x),
        "norm": lambda: norm.rms_norm(x, empty(HIDDEN), 1e-5, x, delta=x, total=x),
        "norm of Gemma": lambda: norm.rms_norm(x, empty(HIDDEN), 1e-5, x, unit_offset=True),
        "norm without weights": lambda: norm.rms_norm(x, None, 1e-5, x),
        "norm of heads": lambda: norm.rms_norm(x, empty(HEAD), 1e-5, x, heads=HEADS),
        "swiglu": lambda: elementwise.apply("gate", x, x, x, SILU),
        "softcap": lambda: elementwise.each("scale", x, x, 1.0, 30.0),
        "position scale": lambda: elementwise.position_scale(x, ints, x, 0.1, 8192),
        "rope table": lambda: rope.rope_table(ints, ints, empty(1, HEAD // 2), 1.0, table),
        "rope table with axes": lambda: rope.rope_table(ints, ints, empty(1, HEAD // 2), 1.0, table, ints),
        "rope of pairs": lambda: rope.rope(x, table, HEADS, True, x),
        "keys and values without rope": lambda: rope.rope_cache(
            None, key, key, None, None, cache, ints, 0, heads=HEADS, kv_heads=KV_HEADS
        ),
        "rope and cache": lambda: rope.rope_cache(
            x, key, key, table, x, cache, ints, 0, heads=HEADS, kv_heads=KV_HEADS
        ),
    }  # fmt: skip


def training_launches() -> dict[str, Callable[[], None]]:
    """As `launches`, of the kernels of training."""
    from deepseek_optimizer.backends.cuda.kernels import train_adamw, train_loss, train_rows

    narrow, count = torch.bfloat16, HIDDEN * HIDDEN
    x, weight, rstd = empty(512, HIDDEN, dtype=narrow), empty(HIDDEN, dtype=narrow), empty(512)
    q, angles = empty(2, 512, HEADS, HEAD, dtype=narrow).transpose(1, 2), empty(1, 512, HEAD, dtype=narrow)
    part, few = q[..., :ROPE], empty(1, 512, ROPE, dtype=narrow)
    logits, labels = empty(512, 128256), empty(512, dtype=torch.int64)
    rates, keys = (1.0, 0.9, 0.1, 0.999, 0.001, 1.0, 1e-8, 1e-4, 1e-6), (5, 6, 7, 8)

    def update(kind: str, master: str) -> Callable[[], None]:
        types = {"fp32": (torch.float32,) * 2, "bf16": (narrow,) * 2, "int8": (torch.int8, torch.uint8)}[kind]
        moments = empty(count, dtype=types[0]), empty(count, dtype=types[1])
        scales = (empty(count // 256), empty(count // 256)) if kind == "int8" else None
        low = empty(count, dtype=torch.int16) if master == "split" else None
        parameter = empty(count, dtype=torch.float32 if master == "none" else narrow)
        gradient = empty(count, dtype=narrow)
        return lambda: train_adamw.adamw(parameter, low, gradient, moments, scales, rates, keys, master)

    return {
        "training, norm": lambda: train_rows.rms_norm(x, weight, 1e-5),
        "training, norm backward": lambda: train_rows.rms_norm_backward(x, x, weight, rstd, True),
        "training, norm backward of a fixed weight": lambda: train_rows.rms_norm_backward(x, x, weight, rstd, False),
        "training, swiglu": lambda: train_rows.swiglu(x, x),
        "training, swiglu backward": lambda: train_rows.swiglu_backward(x, x, x),
        "training, rope": lambda: train_rows.rope(q, angles, angles, False, False, q),
        "training, rope of V3 backward": lambda: train_rows.rope(part, few, few, True, True, part),
        "training, loss": lambda: train_loss.cross_entropy(logits, labels, 0.5, narrow),
        "training, loss in fp32": lambda: train_loss.cross_entropy(logits, labels, 0.5, torch.float32),
        "training, loss without a gradient": lambda: train_loss.cross_entropy(logits, labels, None, narrow),
        **{f"training, adamw in {kind}": update(kind, "split") for kind in ("fp32", "bf16", "int8")},
        "training, adamw without master weights": update("bf16", "stochastic"),
        "training, adamw of fp32 weights": update("int8", "none"),
        "training, squares": lambda: train_adamw.squares(x),
    }


def compiled(capability: int, part: str = "") -> dict[str, dict[str, int]]:
    """By "name: kernel", what each kernel takes, of launches whose names contain `part`."""
    import triton
    from triton.backends.compiler import GPUTarget

    target, results, name = GPUTarget("cuda", capability, 32), {}, ""

    def run(
        kernel: Any, *args: Any, grid: Any, warmup: bool, num_warps: int, num_stages: int = 3, enable_fp_fusion: bool = True,
        **constants: Any,
    ) -> None:  # fmt: skip
        signature, values, facts = {}, dict(constants), {}
        for i, param in enumerate(kernel.params):
            given = constants.get(param.name, args[i] if i < len(args) else None)
            if param.is_constexpr or (isinstance(given, int) and given == 1):
                signature[param.name], values[param.name] = "constexpr", given
            else:
                signature[param.name] = _TYPES[given.dtype] if isinstance(given, torch.Tensor) else _number(given)
                if isinstance(given, torch.Tensor) or isinstance(given, int) and given % 16 == 0:
                    facts[(i,)] = [["tt.divisibility", 16]]
        source = triton.compiler.ASTSource(kernel, signature, constexprs=values, attrs=facts)
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
        made = triton.compile(source, target=target, options=options)
        results[f"{name}: {kernel.__name__}"] = {**_usage(made.asm["cubin"]), "shared": made.metadata.shared}

    triton.JITFunction.run = run
    for name, launch in {**launches(capability), **training_launches()}.items():  # noqa: B007  `run` reads the name
        if part in name:
            launch()
    return results


def constants() -> dict[str, dict[str, list[str]]]:
    """By kernel and constant, the values that the launches give it."""
    import triton

    seen: dict[str, dict[str, list[str]]] = {}

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        of_kernel = seen.setdefault(kernel.__name__, {})
        for param in kernel.params:
            if param.is_constexpr and param.name in given:
                values = of_kernel.setdefault(param.name, [])
                values.extend({str(given[param.name])}.difference(values))

    triton.JITFunction.run = run
    for launch in {**launches(), **training_launches()}.values():
        launch()
    return seen


def _number(value: float) -> str:
    return "fp32" if isinstance(value, float) else "i32"


def _usage(cubin: bytes) -> dict[str, int]:
    """What the assembler says about a kernel: REG, STACK and LOCAL."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


if __name__ == "__main__":
    print(json.dumps(constants() if sys.argv[1] == "constants" else compiled(int(sys.argv[1]), *sys.argv[2:3])))
