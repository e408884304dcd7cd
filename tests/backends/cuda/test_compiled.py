"""The kernels compile for three generations of cards, which need not be there, and take what they may take."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import deepseek_optimizer
from deepseek_optimizer.backends.cuda.layouts import LAYOUTS

TESTS = Path(__file__).parents[2]
CARDS = {80: "A100", 90: "H100", 100: "B200"}
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # of a program, at most; what 8.6 and 8.9 have, with the kernels of 8.0
OTHERS = ("q4_1", "fp8", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "iq4_nl", "q5_0", "q5_1", "mxfp4", "int3")  # formats
MORE = ("int4", "mxfp4")  # of grouped products
CODES = ("int8", "fp8")  # of caches
IN_FP8 = {  # on cards of 8.9 and later
    "rows in FP8": ("tile", 224, 32 << 10),
    "rows in FP8, 16 of them": ("tile", 144, 16 << 10),
    "rows in FP8, gated": ("tile", 176, 24 << 10),
    "rows in FP8, experts": ("pair_tile", 176, 24 << 10),
    "rows in FP8, experts, down": ("pair_tile", 224, 32 << 10),
}
# By launch and kernel: registers of a thread and bytes of shared memory, at most, on every card. Kernels that are not listed
# are small. Products of large tiles and attention of prompts take all 255 registers. Others are what was measured with Triton
# 3.9, and some room.
LIMITS = {
    "vector fp32: vector_product": (48, 2048),
    "vector bf16: vector_product": (80, 2048),
    "vector int8: vector_product": (128, 4096),
    "vector int4: vector_product": (168, 4096),
    "vector int4 of 4 rows, gated: vector_product": (168, 4096),
    "vector int4 of few rows, gelu: vector_product": (168, 4096),
    "vector int4 with a bias: vector_product": (168, 4096),
    **{f"tile int4{what}: tile_product": (255, 112 << 10) for what in (" with a bias", ", gelu")},
    "tile fp32: tile_product": (176, 16 << 10),
    "tile bf16: tile_product": (136, 36 << 10),
    "tile int8: tile_product": (255, 64 << 10),
    "tile int4: tile_product": (255, 112 << 10),
    "tile bf16 of 16 rows, gated: tile_product": (72, 12 << 10),
    "tile int4 of 16 rows, gated: tile_product": (136, 24 << 10),
    **{f"tile {name}, gated: tile_product": (255, 112 << 10) for name in ("int8", "int4")},
    "tile bf16, gated: tile_product": (128, 36 << 10),
    "experts fp32: pair_vector_product": (64, 2048),
    "experts bf16: pair_vector_product": (80, 2048),
    "experts int8: pair_vector_product": (128, 4096),
    "experts int4: pair_vector_product": (168, 4096),
    "experts int4, down: pair_vector_product": (168, 4096),
    **{f"vector {name}: vector_product": (200, 8192) for name in OTHERS},
    **{f"vector {name}: vector_product": (144, 4096) for name in ("q2_k", "q3_k", "int3")},
    **{f"tile {name}: tile_product": (255, 112 << 10) for name in OTHERS},
    "experts int4, down, weighed: pair_vector_product": (168, 4096),
    **{f"experts {name}: pair_vector_product": (200, 8192) for name in (*OTHERS, "mxfp4 of gpt-oss")},
    **{f"experts {name}, grouped: pair_tile_product": (255, 112 << 10) for name in (*LAYOUTS, "mxfp4 of gpt-oss")},
    "experts bf16, weighed, grouped: pair_tile_product": (255, 112 << 10),
    "experts bf16, weighed, grouped: place_pairs": (80, 8192),
    "experts int4, down, grouped: pair_tile_product": (255, 112 << 10),
    "experts int4 of V2-Lite, grouped: pair_tile_product": (192, 48 << 10),
    **{f"experts {name}, grouped: place_pairs": (80, 8192) for name in (*LAYOUTS, "mxfp4 of gpt-oss")},
    "experts int4, down, grouped: place_pairs": (80, 8192),
    **{f"rows in FP8, experts{what}: place_pairs": (80, 8192) for what in ("", ", down")},
    "latents, prefill: attend_latents": (200, 80 << 10),
    "latents, prefill: head_tile_product": (136, 36 << 10),
    "latents, prefill in fp32: attend_latents": (248, 40 << 10),
    "latents, prefill in fp32: head_tile_product": (176, 16 << 10),
    "latents, decoding: attend_latents": (208, 64 << 10),
    "latents, decoding of V2-Lite: attend_latents": (208, 64 << 10),
    "latents, decoding in fp32: attend_latents": (248, 40 << 10),
    "chosen latents, decoding: attend_latents": (208, 64 << 10),
    "expanded latents: expand_keys": (192, 24 << 10),
    "expanded latents: head_tile_product": (136, 36 << 10),
    "expanded latents: attend_expanded": (255, 112 << 10),
    "expanded latents in fp32: expand_keys": (192, 16 << 10),
    "expanded latents in fp32: head_tile_product": (176, 16 << 10),
    "expanded latents in fp32: attend_expanded": (104, 72 << 10),
    "compressed attention, prefill: attend_rows": (255, 96 << 10),
    "compressed attention, prefill in fp32: attend_rows": (255, 36 << 10),
    "compressed attention, decoding: attend_rows": (255, 60 << 10),
    "compressed attention, decoding in fp32: attend_rows": (248, 36 << 10),
    "compressed attention to chosen entries: attend_rows": (255, 64 << 10),
    "attention to a window of rows: attend_rows": (208, 56 << 10),
    "entries of 4 tokens: compress_rows": (160, 4096),
    "entries of 128 tokens: compress_rows": (160, 4096),
    "indexer of entries: index_scores": (128, 64 << 10),
    "indexer of entries: choose_best": (80, 8192),
    "grouped product bf16 of 64 rows: head_tile_product": (168, 48 << 10),
    **{f"grouped product {name}: head_vector_product": (200, 8192) for name in ("fp8", *MORE)},
    **{f"grouped product {name} of 64 rows: head_tile_product": (255, 112 << 10) for name in ("fp8", *MORE)},
    "indexer: index_scores": (128, 64 << 10),
    "indexer: choose_best": (80, 8192),
    "indexer in fp32: index_scores": (96, 48 << 10),
    "indexer in fp32: choose_best": (80, 8192),
    "attention, prefill: attend_tile": (255, 84 << 10),
    "attention, prefill in fp32: attend_tile": (144, 80 << 10),
    "attention, prefill with a softcap: attend_tile": (255, 84 << 10),
    **{f"attention, prefill in {name}: attend_tile": (255, 72 << 10) for name in CODES},
    **{f"attention, decoding in {name}: attend_tile": (184, 24 << 10) for name in CODES},
    **{f"latents, prefill in {name}: attend_latents": (248, 92 << 10) for name in CODES},
    **{f"latents, prefill in {name}: head_tile_product": (136, 36 << 10) for name in CODES},
    **{f"latents, decoding in {name}: attend_latents": (248, 92 << 10) for name in CODES},
    "attention in a step: attend_tile": (160, 60 << 10),
    "attention in a step, windows: attend_tile": (160, 60 << 10),
    "attention in a step, 80 elements: attend_tile": (192, 68 << 10),
    "attention in a step, 256 elements: attend_tile": (224, 84 << 10),
    "attention in a step in fp32: attend_tile": (120, 44 << 10),
    "attention in a step in fp32, 256 elements: attend_tile": (120, 72 << 10),
    **{f"chosen blocks in {name}: estimate_blocks": (104, 76 << 10) for name in ("bf16", *CODES)},
    **{f"chosen blocks in {name}: choose_best": (80, 8192) for name in ("bf16", *CODES)},
    **{f"attention, {phase} to chosen blocks: attend_tile": (136, 40 << 10) for phase in ("decoding", "prefill")},
    **{f"adapters in {name}: {kernel}_rows": (128, 48 << 10) for name in ("fp32", "bf16") for kernel in ("shrink", "expand")},
    **{f"adapters in fp32, rank 64: {kernel}_rows": (168, 64 << 10) for kernel in ("shrink", "expand")},
    "queries in a grid: extend_queries": (80, 32 << 10),
    **{f"{name}: {kernel}_product": limits for name, (kernel, *limits) in IN_FP8.items()},
    "attention of whole prompts: attend_tile": (255, 84 << 10),
    "attention of gpt-oss, prefill: attend_tile": (160, 44 << 10),
    "attention of gpt-oss, decoding: attend_tile": (80, 24 << 10),
    "attention of Gemma 3, prefill: attend_tile": (224, 98 << 10),
    "attention of Gemma 3, decoding: attend_tile": (176, 80 << 10),
    "attention of Gemma 4, prefill: attend_tile": (136, 72 << 10),
    **{f"attention of Gemma 4, decoding{what}: attend_tile": (144, 52 << 10) for what in ("", " in int8", " in fp8")},
    "delta rule: delta_rows": (128, 4096),
    "delta rule of channels: delta_rows": (128, 4096),
    "short convolution: convolve": (128, 8192),
    "attention, prefill in chunks: attend_tile": (255, 84 << 10),
    "attention, decoding in chunks: attend_tile": (112, 40 << 10),
    "attention, decoding: attend_tile": (112, 40 << 10),
    "attention, decoding with a sink: attend_tile": (112, 40 << 10),
    "attention, decoding in fp32: attend_tile": (64, 48 << 10),
    "training, norm: train_rms_norm": (64, 1024),
    "training, norm backward: train_rms_norm_backward": (128, 16 << 10),
    "training, loss: train_cross_entropy": (80, 1024),
    **{f"training, adamw in {name}: train_adamw": (96, 8192) for name in ("fp32", "bf16", "int8")},
}
SMALL = (128, 4096)
# Bytes of stack of a thread, at most, for what does not fit into registers. An fp32 cache is for checking results.
STACK = {
    "expanded latents in fp32: attend_expanded": 24,  # on 9.0
    "experts iq4_xs, grouped: pair_tile_product": 16,  # on 8.0
}
SMALL_STACK = 8


def kernels(what: str) -> dict[str, Any]:
    """What `support.compiled_kernels` prints; it needs a Triton that does not interpret."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip('Triton is not installed: pip install "deepseek-optimizer[cuda]"')
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "support.compiled_kernels", what]
    paths = os.pathsep.join(filter(None, (str(TESTS), environment.get("PYTHONPATH"))))
    child = subprocess.run(command, env={**environment, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    found: dict[str, Any] = json.loads(child.stdout)
    return found


def launched_kernels() -> set[str]:
    """The kernels that the backend's sources launch: `kernel[grid](...)`."""
    made, launched = set(), set()
    for file in (Path(deepseek_optimizer.__file__).parent / "backends" / "cuda").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(each).startswith("triton.jit") for each in node.decorator_list
            ):
                made.add(node.name)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name):
                launched.add(node.func.value.id)
    return made & launched


@pytest.mark.wide
@pytest.mark.every_run
def test_the_list_is_complete():
    """It has each kernel that is launched, with both values of its options and with all formats."""
    listed = kernels("constants")
    assert launched_kernels() == listed.keys()
    options = [(kernel, name) for kernel, given in listed.items() for name in given if {"True", "False"} & set(given[name])]
    assert len(options) > 30
    assert not [each for each in options if len(listed[each[0]][each[1]]) < 2]
    formats = {str(layout) for layout in LAYOUTS.values()}
    for kernel in ("vector_product", "tile_product", "pair_vector_product", "pair_tile_product", "embedding_rows"):
        assert formats <= set(listed[kernel]["LAYOUT"]), kernel


# Each takes ten minutes and more of a processor.
@pytest.mark.parametrize("capability", [pytest.param(card, marks=pytest.mark.slow) for card in CARDS])
def test_what_kernels_take(capability):
    found = kernels(str(capability))
    in_fp8 = {name for name in LIMITS if name.startswith("rows in FP8")}
    assert LIMITS.keys() - (in_fp8 if capability < 89 else set()) <= found.keys() and len(found) > len(LIMITS)
    over = []
    for name, uses in found.items():
        registers, shared = LIMITS.get(name, SMALL)
        stack = STACK.get(name, SMALL_STACK)
        if uses["reg"] > registers or uses["shared"] > min(shared, SHARED[capability]) or uses["stack"] > stack:
            over.append((name, uses))
    assert not over, f"{CARDS[capability]}: {over}"
