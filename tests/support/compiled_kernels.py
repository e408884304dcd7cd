"""Compiles the kernels of backend `cuda` for a card that need not be there, as a program:

    python -m support.compiled_kernels 90        # prints JSON: by kernel registers, stack, shared and local memory

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
from typing import Any

import torch

META = torch.device("meta")
HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 4096, 14336, 32, 8, 128  # of Llama 3.1 8B
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def launches() -> dict[str, Callable[[], None]]:
    """Calls of the functions that launch kernels, by a name for each; a call may launch several kernels."""
    from deepseek_optimizer.backends.cuda.division import Tiles
    from deepseek_optimizer.backends.cuda.kernels import attention, elementwise, linear, norm, rope, rows
    from deepseek_optimizer.backends.cuda.matrices import LAYOUTS, DeviceMatrix
    from deepseek_optimizer.quant.packed import PackedMatrix

    def matrix(format_name: str, outputs: int, columns: int) -> DeviceMatrix:
        tile = LAYOUTS[format_name].tile_words * 4
        data = empty(-(-outputs // 16), -(-columns // 32), tile, dtype=torch.uint8)
        return DeviceMatrix(PackedMatrix(format_name, outputs, columns, data), META)

    def product(format_name: str, count: int) -> Callable[[], None]:
        weights = matrix(format_name, HIDDEN, HIDDEN)
        return lambda: linear.linear(empty(count, HIDDEN), weights, None, empty(count, HIDDEN))

    def gated(format_name: str, count: int) -> Callable[[], None]:
        gate = up = matrix(format_name, INNER, HIDDEN)
        return lambda: linear.gate_up(empty(count, HIDDEN), gate, up, (None, None), empty(count, INNER))

    def attend(kv_dtype: torch.dtype, tiles: int, block_q: int, blocks: int) -> Callable[[], None]:
        fields = Tiles(empty(tiles, 5, dtype=torch.int32), block_q, blocks)
        q, cache = empty(tiles * block_q, HEADS * HEAD), empty(999, 32 * 32 * 2 * KV_HEADS * HEAD, dtype=kv_dtype)
        tables, ends = empty(1, 256, dtype=torch.int32), empty(tiles * block_q, dtype=torch.int32)
        sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "scale": 0.088}
        return lambda: attention.attention(q, cache, 0, tables, fields, ends, q, **sizes)

    ints, x, heads = empty(64, dtype=torch.int32), empty(64, HIDDEN), empty(64, KV_HEADS * HEAD)
    cache, table = empty(99, 32 * 2 * KV_HEADS * HEAD, dtype=torch.bfloat16), empty(64, HEAD)
    return {
        **{f"vector {name}": product(name, 1) for name in LAYOUTS},
        "vector int4 of 4 rows, gated": gated("int4", 4),
        **{f"tile {name}": product(name, 512) for name in LAYOUTS},
        **{f"tile {name} of 16 rows, gated": gated(name, 16) for name in ("bf16", "int4")},
        "attention, prefill": attend(torch.bfloat16, 64, 16, 0),
        "attention, decoding": attend(torch.bfloat16, 1, 1, 128),
        "attention, decoding in fp32": attend(torch.float32, 1, 1, 128),
        "attention, prefill in fp32": attend(torch.float32, 64, 16, 0),
        "embedding": lambda: rows.embedding(ints, matrix("int4", 128256, HIDDEN), 1.0, x),
        "rows": lambda: rows.select_rows(ints, x, x),
        "norm": lambda: norm.rms_norm(x, empty(HIDDEN), 1e-5, x, delta=x, total=x),
        "norm of heads": lambda: norm.rms_norm(x, empty(HEAD), 1e-5, x, heads=HEADS),
        "swiglu": lambda: elementwise.apply("swiglu", x, x, x),
        "rope table": lambda: rope.rope_table(ints, ints, empty(1, HEAD // 2), 1.0, table),
        "rope and cache": lambda: rope.rope_cache(
            x, heads, heads, table, x, cache, ints, 0, heads=HEADS, kv_heads=KV_HEADS
        ),
    }  # fmt: skip


def compiled(capability: int) -> dict[str, dict[str, int]]:
    """By "name: kernel", what each kernel takes."""
    import triton
    from triton.backends.compiler import GPUTarget

    target, results, name = GPUTarget("cuda", capability, 32), {}, ""

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, num_warps: int, num_stages: int = 3, **constants: Any) -> None:
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
        made = triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})
        results[f"{name}: {kernel.__name__}"] = {**_usage(made.asm["cubin"]), "shared": made.metadata.shared}

    triton.JITFunction.run = run
    for name, launch in launches().items():  # noqa: B007  `run` reads the name
        launch()
    return results


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
    print(json.dumps(compiled(int(sys.argv[1]))))
