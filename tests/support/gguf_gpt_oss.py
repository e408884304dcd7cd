"""A GGUF file of a small gpt-oss, written with llama.cpp's package in the layout of its converter.

write_gguf(path, model)
plain = dequantized(model)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.router": "ffn_gate_inp",
}  # fmt: skip


def metadata(config: Any) -> dict[str, Any]:
    """Keys without the architecture."""
    rope = config.rope_parameters
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.intermediate_size,
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": config.sliding_window,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": float(rope["beta_fast"]),
        "rope.scaling.yarn_beta_slow": float(rope["beta_slow"]),
        "vocab_size": config.vocab_size,
    }


def tensors(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """GptOssModel.modify_tensors: names and values, float32."""
    for name, value in model.state_dict().items():
        array, (path, _, leaf) = value.float().numpy(), name.rpartition(".")
        if path in _TOP:
            yield f"{_TOP[path]}.{leaf}", array
            continue
        _, _, layer, inner = path.split(".", 3)
        block = f"blk.{layer}"
        if leaf == "sinks":
            yield f"{block}.attn_sinks.weight", array
        elif leaf == "gate_up_proj":
            array = array.transpose(0, 2, 1)
            yield f"{block}.ffn_gate_exps.weight", array[:, ::2]
            yield f"{block}.ffn_up_exps.weight", array[:, 1::2]
        elif leaf == "gate_up_proj_bias":
            yield f"{block}.ffn_gate_exps.bias", array[:, ::2]
            yield f"{block}.ffn_up_exps.bias", array[:, 1::2]
        elif leaf.startswith("down_proj"):
            form = "bias" if leaf.endswith("bias") else "weight"
            yield f"{block}.ffn_down_exps.{form}", array if form == "bias" else array.transpose(0, 2, 1)
        else:
            yield f"{block}.{_LAYER[inner]}.{leaf}", array


def kind_of(name: str) -> GGMLQuantizationType:
    """MXFP4 for experts, F32 for vectors and routers, Q8_0 for other matrices."""
    if name.endswith("exps.weight"):
        return GGMLQuantizationType.MXFP4
    small = name.endswith("bias") or any(part in name for part in ("norm", "sinks", "ffn_gate_inp"))
    return GGMLQuantizationType.F32 if small else GGMLQuantizationType.Q8_0


def write_gguf(path: Path, model: Any, without: str = "\0") -> Path:
    """`without`: tensors whose name contains this are left out."""
    writer = gguf.GGUFWriter(path, "gpt-oss")
    for key, value in metadata(model.config).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"gpt-oss.{key}", value)
    for name, array in tensors(model):
        if without not in name:
            data = quants.quantize(np.ascontiguousarray(array), kind_of(name))
            writer.add_tensor(name, data, raw_dtype=kind_of(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantized(model: Any) -> Any:
    """The model with the values that `write_gguf` stores, computed without our reader."""
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        stacked = name.endswith(("gate_up_proj", "down_proj"))
        kind = kind_of("exps.weight") if stacked else kind_of(name)
        if parameter.ndim > 1 and not name.endswith(("_bias", "router.weight")):
            value = parameter.data.transpose(1, 2) if stacked else parameter.data
            stored = quants.dequantize(quants.quantize(np.ascontiguousarray(value.numpy()), kind), kind)
            value = torch.from_numpy(stored.copy())
            parameter.data.copy_(value.transpose(1, 2) if stacked else value)
    return twin
