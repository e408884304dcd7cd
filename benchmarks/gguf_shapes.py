"""GGUF files of the shapes people run, of random blocks in the types of llama.cpp's Q4_K_M; for speed, not for text.

    python -m benchmarks.gguf_shapes NAME FILE

Tensors are written one at a time, so that a file may be larger than memory. Names and keys are those of llama.cpp's converter;
the vocabulary is a stand-in of the right size. Layers are the published model's, except where `SHAPES` says otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .gguf_file import stand_in_tokenizer

DEVIATION = 0.02  # of weights


@dataclass(frozen=True)
class Shape:
    """Attributes:
    arch: `general.architecture`.
    title: for people.
    keys: metadata without the architecture.
    tensors: (name, shape, ggml type) of every tensor.
    """

    arch: str
    title: str
    keys: dict[str, Any]
    tensors: Callable[[], Iterable[tuple[str, tuple[int, ...], str]]]


Tensors = Iterable[tuple[str, tuple[int, ...], str]]


def _more_bits(layer: int, layers: int) -> str:
    """The type of attn_v and ffn_down in Q4_K_M: 6 bits in the first and last eighth and in every third layer between."""
    edge = layers // 8
    return "Q6_K" if layer < edge or layer >= layers - edge or (layer - edge) % 3 == 2 else "Q4_K"


def _attention(block: str, hidden: int, q: int, kv: int, head: int, value: str, norms: bool = True) -> Tensors:
    yield f"{block}.attn_q.weight", (q, hidden), "Q4_K"
    yield f"{block}.attn_k.weight", (kv, hidden), "Q4_K"
    yield f"{block}.attn_v.weight", (kv, hidden), value
    if norms:
        yield f"{block}.attn_q_norm.weight", (head,), "F32"
        yield f"{block}.attn_k_norm.weight", (head,), "F32"


def _mlp(block: str, hidden: int, inner: int, down: str) -> Tensors:
    yield f"{block}.ffn_gate.weight", (inner, hidden), "Q4_K"
    yield f"{block}.ffn_up.weight", (inner, hidden), "Q4_K"
    yield f"{block}.ffn_down.weight", (hidden, inner), down


def _qwen35() -> Tensors:
    hidden, layers, inner, vocabulary = 2560, 32, 9216, 248320
    keys, values, head = 16, 32, 128
    yield "token_embd.weight", (vocabulary, hidden), "Q6_K"
    yield "output_norm.weight", (hidden,), "F32"
    for i in range(layers):
        b, more = f"blk.{i}", _more_bits(i, layers)
        yield f"{b}.attn_norm.weight", (hidden,), "F32"
        yield f"{b}.post_attention_norm.weight", (hidden,), "F32"
        if i % 4 == 3:
            yield from _attention(b, hidden, 2 * 16 * 256, 4 * 256, 256, more)
            yield f"{b}.attn_output.weight", (hidden, 16 * 256), "Q4_K"
        else:
            yield f"{b}.attn_qkv.weight", ((2 * keys + values) * head, hidden), "Q4_K"
            yield f"{b}.attn_gate.weight", (values * head, hidden), "Q4_K"
            yield f"{b}.ssm_conv1d.weight", ((2 * keys + values) * head, 4), "F32"
            yield f"{b}.ssm_dt.bias", (values,), "F32"
            yield f"{b}.ssm_a", (values,), "F32"
            yield f"{b}.ssm_beta.weight", (values, hidden), "Q4_K"
            yield f"{b}.ssm_alpha.weight", (values, hidden), "Q4_K"
            yield f"{b}.ssm_norm.weight", (head,), "F32"
            yield f"{b}.ssm_out.weight", (hidden, values * head), "Q4_K"
        yield from _mlp(b, hidden, inner, more)


def _gemma3() -> Tensors:
    hidden, layers, inner, vocabulary = 2560, 34, 10240, 262208
    yield "token_embd.weight", (vocabulary, hidden), "Q6_K"
    yield "output_norm.weight", (hidden,), "F32"
    for i in range(layers):
        b, more = f"blk.{i}", _more_bits(i, layers)
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            yield f"{b}.{norm}.weight", (hidden,), "F32"
        yield from _attention(b, hidden, 8 * 256, 4 * 256, 256, more)
        yield f"{b}.attn_output.weight", (hidden, 8 * 256), "Q4_K"
        yield from _mlp(b, hidden, inner, more)


QWEN3_MOE_LAYERS, GPT_OSS_LAYERS = 16, 12


def _qwen3moe() -> Tensors:
    hidden, inner, experts, vocabulary = 2048, 768, 128, 151936
    yield "token_embd.weight", (vocabulary, hidden), "Q4_K"
    yield "output_norm.weight", (hidden,), "F32"
    yield "output.weight", (vocabulary, hidden), "Q6_K"
    for i in range(QWEN3_MOE_LAYERS):
        b, more = f"blk.{i}", _more_bits(i, QWEN3_MOE_LAYERS)
        yield f"{b}.attn_norm.weight", (hidden,), "F32"
        yield f"{b}.ffn_norm.weight", (hidden,), "F32"
        yield from _attention(b, hidden, 32 * 128, 4 * 128, 128, more)
        yield f"{b}.attn_output.weight", (hidden, 32 * 128), "Q4_K"
        yield f"{b}.ffn_gate_inp.weight", (experts, hidden), "F32"
        yield f"{b}.ffn_gate_exps.weight", (experts, inner, hidden), "Q4_K"
        yield f"{b}.ffn_up_exps.weight", (experts, inner, hidden), "Q4_K"
        yield f"{b}.ffn_down_exps.weight", (experts, hidden, inner), more


def _gpt_oss() -> Tensors:
    hidden, inner, experts, vocabulary, q, kv = 2880, 2880, 32, 201088, 64 * 64, 8 * 64
    yield "token_embd.weight", (vocabulary, hidden), "Q8_0"
    yield "output_norm.weight", (hidden,), "F32"
    yield "output.weight", (vocabulary, hidden), "Q8_0"
    for i in range(GPT_OSS_LAYERS):
        b = f"blk.{i}"
        yield f"{b}.attn_norm.weight", (hidden,), "F32"
        yield f"{b}.post_attention_norm.weight", (hidden,), "F32"
        yield f"{b}.attn_sinks.weight", (64,), "F32"
        for name, rows, columns in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("output", hidden, q)):
            yield f"{b}.attn_{name}.weight", (rows, columns), "Q8_0"
            yield f"{b}.attn_{name}.bias", (rows,), "F32"
        yield f"{b}.ffn_gate_inp.weight", (experts, hidden), "F32"
        yield f"{b}.ffn_gate_inp.bias", (experts,), "F32"
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            yield f"{b}.ffn_{name}_exps.weight", (experts, rows, columns), "MXFP4"
            yield f"{b}.ffn_{name}_exps.bias", (experts, rows), "F32"


def _keys(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, head: int, theta: float) -> dict[str, Any]:
    return {
        "block_count": layers, "context_length": 131072, "embedding_length": hidden, "feed_forward_length": inner,
        "attention.head_count": heads, "attention.head_count_kv": kv_heads, "attention.key_length": head,
        "attention.value_length": head, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": theta,
    }  # fmt: skip


SHAPES = {
    "qwen3.5-4b": Shape(
        "qwen35", "Qwen3.5-4B shape, Q4_K_M",
        _keys(32, 2560, 9216, 16, 4, 256, 1e7) | {
            "rope.dimension_count": 64, "rope.dimension_sections": [11, 11, 10, 0], "full_attention_interval": 4,
            "ssm.conv_kernel": 4, "ssm.state_size": 128, "ssm.group_count": 16, "ssm.time_step_rank": 32,
            "ssm.inner_size": 4096,
        },
        _qwen35,
    ),
    "gemma-3-4b": Shape(
        "gemma3", "gemma-3-4b shape, Q4_K_M",
        _keys(34, 2560, 10240, 8, 4, 256, 1e6) | {
            "rope.freq_base_swa": 1e4, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
            "attention.sliding_window": 1024,
        },
        _gemma3,
    ),
    "qwen3-30b-a3b": Shape(
        "qwen3moe", f"Qwen3-30B-A3B shape, {QWEN3_MOE_LAYERS} layers, Q4_K_M",
        _keys(QWEN3_MOE_LAYERS, 2048, 6144, 32, 4, 128, 1e6) | {
            "expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 768,
        },
        _qwen3moe,
    ),
    "gpt-oss-20b": Shape(
        "gpt-oss", f"gpt-oss-20b shape, {GPT_OSS_LAYERS} layers, MXFP4",
        _keys(GPT_OSS_LAYERS, 2880, 2880, 64, 8, 64, 150000.0) | {
            "attention.layer_norm_rms_epsilon": 1e-5, "expert_feed_forward_length": 2880, "expert_count": 32,
            "expert_used_count": 4, "attention.sliding_window": 128, "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096, "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
        },
        _gpt_oss,
    ),
}  # fmt: skip


def write(name: str, target: Path) -> None:
    """Writes the file of a shape in `SHAPES`."""
    import gguf
    import numpy as np

    shape, random = SHAPES[name], np.random.default_rng(0)
    writer = gguf.GGUFWriter(target, shape.arch, use_temp_file=True)
    for key, value in shape.keys.items():
        full = f"{shape.arch}.{key}"
        if isinstance(value, list):
            writer.add_array(full, value)
        else:
            add: Any = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(full, value)
    for tensor, sizes, kind in shape.tensors():
        code = gguf.GGMLQuantizationType[kind]
        if tensor == "token_embd.weight":
            stand_in_tokenizer(writer, sizes[0])
        if kind == "F32":
            writer.add_tensor(tensor, _floats(tensor, sizes, random))
        else:
            rows = int(np.prod(sizes[:-1]))
            blocks = random_blocks(rows, sizes[-1], kind, random)
            writer.add_tensor(tensor, blocks.reshape(*sizes[:-1], -1), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _floats(name: str, sizes: tuple[int, ...], random: Any) -> Any:
    """Norms are 1, decays of a recurrent state -1, other values small."""
    import numpy as np

    if "norm" in name:
        return np.ones(sizes, np.float32)
    if name.endswith("ssm_a"):
        return -np.ones(sizes, np.float32)
    return random.normal(0, DEVIATION, sizes).astype(np.float32)


# Where a block's fp16 scales lie, and each one's value in units of the first: a minimum is the middle of the codes.
_SCALES = {"Q4_K": ((0, 1.0), (2, 7.5)), "Q6_K": ((208, 1.0),), "Q8_0": ((0, 1.0),)}


def random_blocks(rows: int, columns: int, kind: str, random: Any) -> Any:
    """Random codes and scales, uint8 [rows, bytes]; weights have a mean near 0 and a standard deviation near DEVIATION."""
    import gguf
    import numpy as np

    code = gguf.GGMLQuantizationType[kind]
    numbers, size = gguf.GGML_QUANT_SIZES[code]
    blocks = random.integers(0, 256, (rows, columns // numbers, size), np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = 120  # 2^-7 times values of up to 6, with a standard deviation of about 3
        return blocks.reshape(rows, -1)
    if kind == "Q4_K":  # 6-bit minimums equal to the scales
        blocks[..., 8:12] = blocks[..., 4:8]
        blocks[..., 12:16] = (blocks[..., 12:16] & 15) * 17

    def fill(first: float) -> None:
        for at, ratio in _SCALES[kind]:
            blocks[..., at : at + 2] = np.frombuffer(np.float16(first * ratio).tobytes(), np.uint8)

    fill(1.0)
    few = np.ascontiguousarray(blocks[:16]).reshape(min(rows, 16), -1)
    fill(DEVIATION / float(gguf.quants.dequantize(few, code).std()))
    return blocks.reshape(rows, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("file", type=Path)
    a = parser.parse_args()
    write(a.name, a.file)


if __name__ == "__main__":
    main()
