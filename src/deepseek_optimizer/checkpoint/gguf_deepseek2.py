"""GGUF's `deepseek2`: DeepSeek-V2, V2-Lite, Coder-V2 (softmax gating), V3, R1, Kimi-K2 (sigmoid), Youtu (no experts).

This module reverses the changes that llama.cpp's converter makes:

- multi-head latent attention is one KV head of `kv_lora_rank + qk_rope_head_dim` elements: `head_count_kv` is 1, and the sizes
  of the real heads are in `key_length_mla` and `value_length_mla` (older files: in `key_length` and `value_length`);
- `kv_b_proj` becomes `attn_k_b` [heads, rank, nope], each head's keys transposed, and `attn_v_b` [heads, v_dim, rank] (older
  files: `attn_kv_b`, unchanged);
- the experts of a layer are merged into one tensor for each of gate, up and down;
- `yarn_log_multiplier` is a tenth of `mscale_all_dim`, and `mscale` is assumed to be the same.

Rows are not permuted for RoPE: here, llama.cpp rotates adjacent elements (LLAMA_ROPE_TYPE_NORM), as DeepSeek does.
Sources: llama.cpp's convert_hf_to_gguf.py (DeepseekV2Model), src/models/deepseek2.cpp, llama-model.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError, UnsupportedModelError
from .gguf_header import GgufTensor
from .gguf_metadata import Metadata

LAYER = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
WHOLE = {  # tensors whose last name component changes too
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_exps.weight": "mlp.experts.gate_proj",
    "ffn_up_exps.weight": "mlp.experts.up_proj",
    "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
}
_SOFTMAX, _SIGMOID = 1, 2
_BLOCK = re.compile(r"blk\.(\d{1,5})\.")


def decoder_layers(meta: Metadata) -> int:
    """Number of layers without those for multi-token prediction, which `block_count` may include."""
    blocks = meta.integer(meta.of_model("block_count"))
    extra = meta.integer(meta.of_model("nextn_predict_layers"), 0, minimum=0)
    if extra >= blocks:
        raise meta.wrong(meta.of_model("nextn_predict_layers"), f"is {extra}, but must be less than block_count, {blocks}")
    return blocks - extra


def prediction_tensors(meta: Metadata) -> list[str]:
    """Names of the tensors of layers for multi-token prediction."""
    layers = decoder_layers(meta)
    if not meta.has("nextn_predict_layers"):
        return []
    return [name for name in meta.tensors if (match := _BLOCK.match(name)) and int(match[1]) >= layers]


def deepseek2_config(meta: Metadata, rope: dict[str, Any]) -> dict[str, Any]:
    """Config fields of this architecture that the common ones lack or that differ from them.

    Args:
        meta: the file's metadata.
        rope: the common `rope_parameters`.

    Raises:
        UnsupportedModelError: a feature or gating that is not supported.
        CheckpointError: a value is missing or invalid.
    """
    _refuse(meta)
    heads = meta.integer(meta.of_model("attention.head_count"))
    rope_dim = meta.integer(meta.of_model("rope.dimension_count"))
    key = meta.of_model("attention.key_length_mla" if meta.has("attention.key_length_mla") else "attention.key_length")
    value = meta.of_model("attention.value_length_mla" if meta.has("attention.value_length_mla") else "attention.value_length")
    nope = meta.integer(key) - rope_dim
    if nope <= 0:
        raise meta.wrong(key, f"is {nope + rope_dim}, but must exceed {meta.of_model('rope.dimension_count')}, {rope_dim}")
    compressed = "blk.0.attn_q_a.weight" in meta.tensors
    config: dict[str, Any] = {
        "attention_bias": False,
        "head_dim": rope_dim,
        "kv_lora_rank": meta.integer(meta.of_model("attention.kv_lora_rank")),
        "num_key_value_heads": heads,
        "q_lora_rank": meta.integer(meta.of_model("attention.q_lora_rank")) if compressed else None,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope_dim,
        "rope_parameters": _yarn(meta, rope),
        "v_head_dim": meta.integer(value),
    }
    layers = decoder_layers(meta)
    dense = meta.integer(meta.of_model("leading_dense_block_count"), 0, minimum=0)
    if meta.integer(meta.of_model("expert_count"), 0, minimum=0) == 0 or dense >= layers:
        return config | {"model_type": "youtu", "architectures": ["YoutuForCausalLM"], "rope_interleave": True}
    return config | _experts(meta, dense)


def _experts(meta: Metadata, dense: int) -> dict[str, Any]:
    gating = _gating(meta)
    groups = meta.integer(meta.of_model("expert_group_count"), 1)
    scale = meta.values.get(meta.of_model("expert_weights_scale"), 1.0)
    fields: dict[str, Any] = {
        "first_k_dense_replace": dense,
        "moe_intermediate_size": meta.integer(meta.of_model("expert_feed_forward_length")),
        "n_group": groups,
        "n_routed_experts": meta.integer(meta.of_model("expert_count")),
        "n_shared_experts": meta.integer(meta.of_model("expert_shared_count")),
        "norm_topk_prob": meta.flag(meta.of_model("expert_weights_norm")),
        "num_experts_per_tok": meta.integer(meta.of_model("expert_used_count")),
        # in llama.cpp, 0 means "no scale"
        "routed_scaling_factor": 1.0 if scale == 0 else meta.number(meta.of_model("expert_weights_scale"), 1.0),
        "topk_group": meta.integer(meta.of_model("expert_group_used_count"), 1),
    }
    biased = [name for name in meta.tensors if name.endswith(".exp_probs_b.bias")]
    if gating == _SIGMOID:
        return fields | {
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            "num_nextn_predict_layers": 0,
            "rope_interleave": True,
        }
    if biased:
        raise CheckpointError("is for sigmoid gating, but the metadata specify softmax", file=meta.path, tensor=biased[0])
    if fields["norm_topk_prob"]:
        raise UnsupportedModelError(
            f"{meta.path}: {meta.of_model('expert_weights_norm')} is true with softmax gating, which is not supported"
        )
    return fields | {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
    }


def _gating(meta: Metadata) -> int:
    """_SOFTMAX or _SIGMOID. Files from before the key existed are V2's, unless they have correction biases."""
    key = meta.of_model("expert_gating_func")
    if key not in meta.values:
        return _SIGMOID if any(name.endswith(".exp_probs_b.bias") for name in meta.tensors) else _SOFTMAX
    gating = meta.integer(key)
    if gating not in (_SOFTMAX, _SIGMOID):
        raise UnsupportedModelError(f"{meta.path}: {key} is {gating}; 1 (softmax) and 2 (sigmoid) are supported")
    return gating


def _refuse(meta: Metadata) -> None:
    """Raises UnsupportedModelError for features of other models that use the same architecture name."""
    for key, value in meta.values.items():
        if key.startswith(meta.of_model("attention.indexer.")):
            raise UnsupportedModelError(f"{meta.path}: {key}: sparse attention is not supported in GGUF files")
        if key == meta.of_model("attention.temperature_scale") and value:
            raise UnsupportedModelError(f"{meta.path}: {key}: attention whose scale grows with the position is not supported")
    if meta.number(meta.of_model("rope.scaling.attn_factor"), 1.0) != 1.0:
        key = meta.of_model("rope.scaling.attn_factor")
        raise UnsupportedModelError(f"{meta.path}: {key} is not supported with latent attention")


def _yarn(meta: Metadata, rope: dict[str, Any]) -> dict[str, Any]:
    """`rope` with YaRN's mscale, if the file has it."""
    key = meta.of_model("rope.scaling.yarn_log_multiplier")
    rope = {name: value for name, value in rope.items() if name != "attention_factor"}
    if rope["rope_type"] != "yarn" or key not in meta.values:
        return rope
    mscale = round(10 * meta.number(key), 6)  # float32 in the file
    return rope | {"mscale": mscale, "mscale_all_dim": mscale}


@dataclass(frozen=True)
class SplitKvB:
    """`kv_b_proj` as newer files store it. `keys`: [heads, rank, nope]; `values`: [heads, v_dim, rank]."""

    keys: GgufTensor
    values: GgufTensor

    @property
    def shape(self) -> tuple[int, int]:
        heads, rank, nope = self.keys.shape
        return heads * (nope + self.values.shape[1]), rank

    @property
    def type_name(self) -> str:
        """The ggml type, or both types if they differ."""
        return " and ".join(dict.fromkeys((self.keys.type.name, self.values.type.name)))

    def rows(self, begin: int, end: int, read: Callable[[GgufTensor, int, int], torch.Tensor]) -> torch.Tensor:
        """Rows [begin, end) of kv_b_proj, float [end - begin, rank]: for each head, its keys, then its values.

        Args:
            read: returns rows [first, last) of a stored tensor as float; all dimensions but the last count as rows.
        """
        _, rank, nope = self.keys.shape
        v_dim = self.values.shape[1]
        size = nope + v_dim
        first, last = begin // size, -(-end // size)
        keys = read(self.keys, first * rank, last * rank).view(-1, rank, nope).transpose(1, 2)
        values = read(self.values, first * v_dim, last * v_dim).view(-1, v_dim, rank)
        return torch.cat([keys, values], 1).view(-1, rank)[begin - first * size : end - first * size]


def split_kv_b(stored: dict[str, GgufTensor], config: dict[str, Any], file: object) -> dict[str, SplitKvB]:
    """Removes both halves of every `kv_b_proj.weight` from `stored` and returns them, by parameter name.

    If the whole matrix is stored too, it is used, and the halves are dropped.

    Args:
        stored: tensors by Transformers' name; changed in place.
        config: the model's.
        file: for errors.

    Raises:
        CheckpointError: a half without the other, or with a wrong shape.
    """
    heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    expected = {"k_b": (heads, rank, config["qk_nope_head_dim"]), "v_b": (heads, config["v_head_dim"], rank)}
    split = {}
    for name in [name for name in stored if name.endswith(".k_b_proj.weight")]:
        whole, other = name.replace(".k_b_proj.", ".kv_b_proj."), name.replace(".k_b_proj.", ".v_b_proj.")
        if other not in stored:
            raise CheckpointError(f"is present without {other}", file=file, tensor=name)
        pair = SplitKvB(stored.pop(name), stored.pop(other))
        if whole in stored:
            continue
        for part, tensor in (("k_b", pair.keys), ("v_b", pair.values)):
            if tensor.shape != expected[part]:
                raise CheckpointError(
                    f"has shape {tensor.shape}, but the metadata require {expected[part]}", file=file, tensor=tensor.name
                )
        split[whole] = pair
    return split
