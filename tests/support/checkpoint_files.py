"""Checkpoint files assembled byte by byte, so that tests can make them invalid.

path.write_bytes(safetensors_bytes({"w": torch.ones(2, 3)}))
path.write_bytes(gguf_bytes(model_values("llama"), model_tensors("llama")))
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.float64: "F64"}
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def with_header(header: bytes | Mapping[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file with this header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def safetensors_header(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        piece = raw(tensor)
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(piece)],
        }
        data += piece
    return header, data


def safetensors_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return with_header(*safetensors_header(tensors))


def gguf_string(text: str | bytes) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text)) + text


def gguf_value(kind: int, value: Any) -> bytes:
    """A typed value; an ARRAY's value is (element type, list)."""
    if kind == STRING:
        return struct.pack("<I", kind) + gguf_string(value)
    if kind == ARRAY:
        element, items = value
        body = b"".join(gguf_value(element, item)[4:] for item in items)
        return struct.pack("<IIQ", kind, element, len(items)) + body
    return struct.pack("<I" + _CODES[kind], kind, value)


def gguf_tensor(name: str, values: torch.Tensor, kind: str = "F32") -> tuple[str, int, tuple[int, ...], bytes]:
    """(name, type, dimensions innermost first, data) of a float tensor stored as `kind`."""
    code = GGMLQuantizationType[kind]
    data = quants.quantize(values.float().numpy(), code)
    return name, int(code), tuple(reversed(values.shape)), np.ascontiguousarray(data).tobytes()


def gguf_bytes(
    values: Mapping[str, tuple[int, Any]],
    tensors: Iterable[tuple[str, int, tuple[int, ...], bytes]],
    *,
    version: int = 3,
    alignment: int = 32,
    offsets: Mapping[str, int] | None = None,
) -> bytes:
    """A complete file. `offsets` replaces the tensors' true offsets."""
    tensors = list(tensors)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    head += b"".join(gguf_string(key) + gguf_value(*value) for key, value in values.items())
    data = b""
    for name, code, dims, body in tensors:
        data += b"\0" * (-len(data) % alignment)
        offset = (offsets or {}).get(name, len(data))
        head += gguf_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)
        data += body
    return head + b"\0" * (-len(head) % alignment) + data


HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCAB = 64, 4, 2, 96, 40
HEAD_DIM = {"qwen3": 128}  # others: 16. Transformers does not read head_dim from a qwen3 file, and uses its default


def model_values(architecture: str = "llama", layers: int = 1, **more: tuple[int, Any]) -> dict[str, tuple[int, Any]]:
    """Metadata of a tiny model; keyword arguments use __ for dots."""
    values: dict[str, tuple[int, Any]] = {
        "general.architecture": (STRING, architecture),
        f"{architecture}.block_count": (U32, layers),
        f"{architecture}.context_length": (U32, 128),
        f"{architecture}.embedding_length": (U32, HIDDEN),
        f"{architecture}.feed_forward_length": (U32, INTERMEDIATE),
        f"{architecture}.attention.head_count": (U32, HEADS),
        f"{architecture}.attention.head_count_kv": (U32, KV_HEADS),
        f"{architecture}.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        f"{architecture}.rope.freq_base": (F32, 10000.0),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, [f"t{i}" for i in range(VOCAB)])),
        "tokenizer.ggml.scores": (ARRAY, (F32, [0.0] * VOCAB)),
        "tokenizer.ggml.bos_token_id": (U32, 1),
        "tokenizer.ggml.eos_token_id": (U32, 2),
    }
    if architecture == "llama":
        values["llama.rope.dimension_count"] = (U32, 16)
    else:
        values[f"{architecture}.attention.key_length"] = (U32, HEAD_DIM.get(architecture, 16))
    return values | {key.replace("__", "."): value for key, value in more.items()}


def model_tensors(
    architecture: str = "llama", layers: int = 1, kind: str = "F32", tied: bool = False, seed: int = 0
) -> list[tuple[str, int, tuple[int, ...], bytes]]:
    """Random weights for `model_values`; matrices are stored as `kind`, vectors as F32."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    head_dim = HEAD_DIM.get(architecture, 16)
    q, kv = HEADS * head_dim, KV_HEADS * head_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (VOCAB, HIDDEN)
    for i in range(layers):
        block = {
            "attn_norm.weight": (HIDDEN,), "attn_q.weight": (q, HIDDEN), "attn_k.weight": (kv, HIDDEN),
            "attn_v.weight": (kv, HIDDEN), "attn_output.weight": (HIDDEN, q), "ffn_norm.weight": (HIDDEN,),
            "ffn_gate.weight": (INTERMEDIATE, HIDDEN), "ffn_up.weight": (INTERMEDIATE, HIDDEN),
            "ffn_down.weight": (HIDDEN, INTERMEDIATE),
        }  # fmt: skip
        if architecture == "qwen2":
            block |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if architecture == "qwen3":
            block |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    return [gguf_tensor(name, random(*shape), kind if len(shape) == 2 else "F32") for name, shape in shapes.items()]


def deepseek2_values() -> dict[str, tuple[int, Any]]:
    """Metadata of the smallest DeepSeek-V3: two layers, the first dense, and four experts."""
    sizes = {
        "block_count": 2, "context_length": 128, "embedding_length": 32, "feed_forward_length": 32,
        "attention.head_count": 2, "attention.head_count_kv": 1, "attention.kv_lora_rank": 32, "attention.q_lora_rank": 32,
        "attention.key_length": 48, "attention.value_length": 32, "attention.key_length_mla": 48,
        "attention.value_length_mla": 32, "rope.dimension_count": 16, "leading_dense_block_count": 1, "expert_count": 4,
        "expert_used_count": 2, "expert_shared_count": 1, "expert_feed_forward_length": 32, "expert_gating_func": 2,
        "expert_group_count": 2, "expert_group_used_count": 1, "nextn_predict_layers": 0,
    }  # fmt: skip
    numbers = {
        "attention.layer_norm_rms_epsilon": 1e-5, "expert_weights_scale": 2.5, "rope.scaling.factor": 4.0,
        "rope.scaling.yarn_log_multiplier": 0.1,
    }  # fmt: skip
    own: dict[str, tuple[int, Any]] = {
        **{key: (U32, value) for key, value in sizes.items()},
        **{key: (F32, value) for key, value in numbers.items()},
        "rope.scaling.type": (STRING, "yarn"),
        "rope.scaling.original_context_length": (U32, 64),
        "expert_weights_norm": (BOOL, 1),
    }
    return {"general.architecture": (STRING, "deepseek2"), **{f"deepseek2.{key}": value for key, value in own.items()}}


STACKS = {"model.layers.1.mlp.experts.gate_up_proj": (8, 32, 32), "model.layers.1.mlp.experts.down_proj": (4, 32, 32)}


def deepseek2_tensors(kind: str = "Q8_0") -> list[tuple[str, int, tuple[int, ...], bytes]]:
    """Random weights for `deepseek2_values`."""
    attention = {
        "attn_norm.weight": (32,), "attn_q_a.weight": (32, 32), "attn_q_a_norm.weight": (32,), "attn_q_b.weight": (96, 32),
        "attn_kv_a_mqa.weight": (48, 32), "attn_kv_a_norm.weight": (32,), "attn_k_b.weight": (2, 32, 32),
        "attn_v_b.weight": (2, 32, 32), "attn_output.weight": (32, 64), "ffn_norm.weight": (32,),
    }  # fmt: skip
    roles = ("gate", "up", "down")
    dense = {f"ffn_{role}.weight": (32, 32) for role in roles}
    sparse = {f"ffn_{role}_exps.weight": (4, 32, 32) for role in roles} | {
        f"ffn_{role}_shexp.weight": (32, 32) for role in roles
    }
    sparse |= {"ffn_gate_inp.weight": (4, 32), "exp_probs_b.bias": (4,)}
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, 32),
        "output_norm.weight": (32,),
        "output.weight": (VOCAB, 32),
    }
    shapes |= {f"blk.0.{name}": shape for name, shape in {**attention, **dense}.items()}
    shapes |= {f"blk.1.{name}": shape for name, shape in {**attention, **sparse}.items()}
    generator = torch.Generator().manual_seed(0)
    return [
        gguf_tensor(name, torch.randn(shape, generator=generator) * 0.1, kind if len(shape) > 1 else "F32")
        for name, shape in shapes.items()
    ]
