"""GGUF's `deepseek2`: DeepSeek-V2, V2-Lite, Coder-V2 (softmax gating), V3, R1, Kimi-K2 (sigmoid), Youtu (no experts); and the
architectures with the same attention: `deepseek32`, `glm-dsa`, `mistral4`, `kimi-linear`.

This module reverses the changes that llama.cpp's converter makes:

- multi-head latent attention is one KV head of `kv_lora_rank + qk_rope_head_dim` elements: `head_count_kv` is 1, and the sizes
  of the real heads are in `key_length_mla` and `value_length_mla` (older files: in `key_length` and `value_length`);
- `kv_b_proj` becomes `attn_k_b` [heads, rank, nope], each head's keys transposed, and `attn_v_b` [heads, v_dim, rank] (older
  files: `attn_kv_b`, unchanged);
- the experts of a layer are merged into one tensor for each of gate, up and down;
- `yarn_log_multiplier` is a tenth of `mscale_all_dim`, and `mscale` is assumed to be the same.

Rows are not permuted for RoPE: here, llama.cpp rotates adjacent elements (LLAMA_ROPE_TYPE_NORM), as DeepSeek does. Nor are an
indexer's: llama.cpp rotates adjacent elements in GLM's, and halves in DeepSeek-V3.2's, as Transformers does.
Sources: llama.cpp's conversion/deepseek.py, glm.py and mistral3.py, src/models/deepseek2.cpp, deepseek32.cpp, glm-dsa.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ..errors import CheckpointError, UnsupportedModelError
from .gguf_metadata import Metadata
from .gguf_parameters import Decode, Parameter, ReadRows

_SOFTMAX, _SIGMOID = 1, 2


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
    config = _latent(meta) | {"attention_bias": False, "rope_parameters": _yarn(meta, rope)}
    if meta.integer(meta.of_model("expert_count"), 0, minimum=0) == 0 or _dense_layers(meta) >= meta.layers:
        return config | {"model_type": "youtu", "architectures": ["YoutuForCausalLM"], "rope_interleave": True}
    return config | _experts(meta)


def sparse_config(meta: Metadata, rope: dict[str, Any]) -> dict[str, Any]:
    """Config fields of `deepseek32` besides the common ones: as DeepSeek-V3, with an indexer.

    Raises:
        UnsupportedModelError: a gating that is not supported.
        CheckpointError: a value is missing or invalid.
    """
    _expect_gating(meta, _SIGMOID, "2 (sigmoid)")
    return _latent(meta) | _routing(meta) | _layer_kinds(meta) | {
        "attention_bias": False,
        "index_head_dim": meta.integer(meta.of_model("attention.indexer.key_length")),
        "index_n_heads": meta.integer(meta.of_model("attention.indexer.head_count")),
        "index_topk": meta.integer(meta.of_model("attention.indexer.top_k")),
        "rope_parameters": _yarn(meta, rope),
    }  # fmt: skip


def glm_sparse_config(meta: Metadata, rope: dict[str, Any]) -> dict[str, Any]:
    """Config fields of `glm-dsa`, as `sparse_config`, whose indexers several layers may share.

    Files without this list are of GLM-5 and 5.1, in which no layers do, or, with a context of 2^20 tokens, of GLM-5.2.
    """
    every = 4 if meta.integer(meta.of_model("context_length")) >= 1 << 20 else 1
    full = meta.per_layer("attention.indexer.types") or [max(layer - 2, 0) % every == 0 for layer in range(meta.layers)]
    return sparse_config(meta, rope) | {"indexer_types": ["full" if own else "shared" for own in full]}


def mistral4_config(meta: Metadata, rope: dict[str, Any]) -> dict[str, Any]:
    """Config fields of `mistral4` besides the common ones.

    Files that were converted from Transformers' format lack the growth of the queries; it is 0.1 in the published model.

    Raises:
        UnsupportedModelError: a gating or scaling of RoPE that is not supported.
        CheckpointError: a value is missing or invalid.
    """
    _expect_gating(meta, _SOFTMAX, "1 (softmax)")
    if rope["rope_type"] != "yarn":
        raise UnsupportedModelError(f"{meta.path}: {meta.of_model('rope.scaling.type')} must be 'yarn' in Mistral 4")
    growth = meta.number(meta.of_model("attention.temperature_scale"), 0.1)
    latent = _latent(meta)
    return latent | _routing(meta) | {
        "attention_bias": False,
        "head_dim": latent["qk_nope_head_dim"] + latent["qk_rope_head_dim"],
        "rope_interleave": True,
        "rope_parameters": _yarn(meta, rope) | {"llama_4_scaling_beta": growth},
    }  # fmt: skip


def kimi_config(meta: Metadata, rope: dict[str, Any]) -> dict[str, Any]:
    """Config fields of `kimi-linear` besides the common ones. The experts' weights are always normalized.

    Raises:
        CheckpointError: a value is missing or invalid.
    """
    _expect_gating(meta, _SIGMOID, "2 (sigmoid)")
    return _latent(meta) | _layer_kinds(meta) | {
        "linear_conv_kernel_dim": meta.integer(meta.of_model("ssm.conv_kernel")),
        "linear_head_dim": meta.integer(meta.of_model("kda.head_dim")),
        "linear_num_heads": meta.integer(meta.of_model("attention.head_count")),
        "moe_intermediate_size": meta.integer(meta.of_model("expert_feed_forward_length")),
        "n_group": meta.integer(meta.of_model("expert_group_count"), 1),
        "n_shared_experts": meta.integer(meta.of_model("expert_shared_count")),
        "norm_topk_prob": True,
        "num_experts_per_tok": meta.integer(meta.of_model("expert_used_count")),
        "num_local_experts": meta.integer(meta.of_model("expert_count")),
        "routed_scaling_factor": meta.number(meta.of_model("expert_weights_scale"), 1.0),
        "topk_group": meta.integer(meta.of_model("expert_group_used_count"), 1),
    }  # fmt: skip


def _dense_layers(meta: Metadata) -> int:
    return meta.integer(meta.of_model("leading_dense_block_count"), 0, minimum=0)


def _layer_kinds(meta: Metadata) -> dict[str, Any]:
    dense = _dense_layers(meta)
    return {"mlp_layer_types": ["dense" if layer < dense else "sparse" for layer in range(meta.layers)]}


def _latent(meta: Metadata) -> dict[str, Any]:
    """Sizes of latent attention."""
    heads = meta.integer(meta.of_model("attention.head_count"))
    rope_dim = meta.integer(meta.of_model("rope.dimension_count"))
    key = meta.of_model("attention.key_length_mla" if meta.has("attention.key_length_mla") else "attention.key_length")
    value = meta.of_model("attention.value_length_mla" if meta.has("attention.value_length_mla") else "attention.value_length")
    nope = meta.integer(key) - rope_dim
    if nope <= 0:
        raise meta.wrong(key, f"is {nope + rope_dim}, but must exceed {meta.of_model('rope.dimension_count')}, {rope_dim}")
    compressed = any(name.endswith(".attn_q_a.weight") for name in meta.tensors)
    return {
        "head_dim": rope_dim,
        "kv_lora_rank": meta.integer(meta.of_model("attention.kv_lora_rank")),
        "num_key_value_heads": heads,
        "q_lora_rank": meta.integer(meta.of_model("attention.q_lora_rank")) if compressed else None,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": meta.integer(value),
    }


def _routing(meta: Metadata) -> dict[str, Any]:
    scale = meta.values.get(meta.of_model("expert_weights_scale"), 1.0)
    return {
        "first_k_dense_replace": _dense_layers(meta),
        "moe_intermediate_size": meta.integer(meta.of_model("expert_feed_forward_length")),
        "n_group": meta.integer(meta.of_model("expert_group_count"), 1),
        "n_routed_experts": meta.integer(meta.of_model("expert_count")),
        "n_shared_experts": meta.integer(meta.of_model("expert_shared_count")),
        "norm_topk_prob": meta.flag(meta.of_model("expert_weights_norm")),
        "num_experts_per_tok": meta.integer(meta.of_model("expert_used_count")),
        # in llama.cpp, 0 means "no scale"
        "routed_scaling_factor": 1.0 if scale == 0 else meta.number(meta.of_model("expert_weights_scale"), 1.0),
        "topk_group": meta.integer(meta.of_model("expert_group_used_count"), 1),
    }


def _experts(meta: Metadata) -> dict[str, Any]:
    gating, fields = _gating(meta), _routing(meta)
    biased = [name for name in meta.tensors if name.endswith(".exp_probs_b.bias")]
    if gating == _SIGMOID:
        return fields | {"num_nextn_predict_layers": 0, "rope_interleave": True}
    if biased:
        raise CheckpointError("is for sigmoid gating, but the metadata specify softmax", file=meta.path, tensor=biased[0])
    if fields["norm_topk_prob"]:
        raise UnsupportedModelError(
            f"{meta.path}: {meta.of_model('expert_weights_norm')} is true with softmax gating, which is not supported"
        )
    return fields | {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "topk_method": "group_limited_greedy" if fields["n_group"] > 1 else "greedy",
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


def _expect_gating(meta: Metadata, gating: int, named: str) -> None:
    """Raises UnsupportedModelError for any other gating than that of the architecture."""
    if _gating(meta) != gating:
        raise UnsupportedModelError(
            f"{meta.path}: {meta.of_model('expert_gating_func')} must be {named} with architecture {meta.architecture!r}"
        )


def _refuse(meta: Metadata) -> None:
    """Raises UnsupportedModelError for features of other models that use the same architecture name."""
    for key, value in meta.values.items():
        if key.startswith(meta.of_model("attention.indexer.")):
            raise UnsupportedModelError(
                f"{meta.path}: {key}: sparse attention is supported with architectures 'deepseek32' and 'glm-dsa' only"
            )
        if key == meta.of_model("attention.temperature_scale") and value:
            raise UnsupportedModelError(f"{meta.path}: {key}: attention whose scale grows with the position is not supported")


def _yarn(meta: Metadata, rope: dict[str, Any]) -> dict[str, Any]:
    """`rope` with YaRN's mscale, if the file has it; UnsupportedModelError for a factor of cosines and sines."""
    if meta.number(meta.of_model("rope.scaling.attn_factor"), 1.0) != 1.0:
        key = meta.of_model("rope.scaling.attn_factor")
        raise UnsupportedModelError(f"{meta.path}: {key} is not supported with latent attention")
    key = meta.of_model("rope.scaling.yarn_log_multiplier")
    rope = {name: value for name, value in rope.items() if name != "attention_factor"}
    if rope["rope_type"] != "yarn" or key not in meta.values:
        return rope
    mscale = round(10 * meta.number(key), 6)  # float32 in the file
    return rope | {"mscale": mscale, "mscale_all_dim": mscale}


class SplitKvB(Parameter):
    """`kv_b_proj` as newer files store it. Sources: keys [heads, rank, nope] and values [heads, v_dim, rank]."""

    fallback: ClassVar[str] = "bf16"

    @property
    def type(self) -> None:
        """The groups of the stored keys run along a head's keys, which are not the columns of the parameter."""
        return None

    def misshapen(self) -> bool:
        return False  # checked by `split_kv_b`

    def floats(self, begin: int, end: int, read: ReadRows, decode: Decode) -> torch.Tensor:
        """Rows [begin, end) of kv_b_proj, float [end - begin, rank]: for each head, its keys, then its values."""
        stored_keys, stored_values = self.sources
        _, rank, nope = stored_keys.shape
        v_dim = stored_values.shape[1]
        size = nope + v_dim
        first, last = begin // size, -(-end // size)
        keys = decode(stored_keys, read(stored_keys, first * rank, last * rank)).view(-1, rank, nope).transpose(1, 2)
        values = decode(stored_values, read(stored_values, first * v_dim, last * v_dim)).view(-1, v_dim, rank)
        return torch.cat([keys, values], 1).view(-1, rank)[begin - first * size : end - first * size]


def split_kv_b(parameters: dict[str, Parameter], config: Mapping[str, Any], file: object) -> None:
    """Replaces both halves of every `kv_b_proj.weight` in `parameters` by the whole.

    If the whole matrix is stored too, it is used, and the halves are dropped.

    Raises:
        CheckpointError: a half without the other, or with a wrong shape.
    """
    heads, rank, nope, v_dim = (
        config[name] for name in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    )
    expected = ((heads, rank, nope), (heads, v_dim, rank))
    for name in [name for name in parameters if name.endswith(".k_b_proj.weight")]:
        whole, other = name.replace(".k_b_proj.", ".kv_b_proj."), name.replace(".k_b_proj.", ".v_b_proj.")
        if other not in parameters:
            raise CheckpointError(f"is present without {other}", file=file, tensor=name)
        halves = parameters.pop(name).sources + parameters.pop(other).sources
        if whole in parameters:
            continue
        for tensor, shape in zip(halves, expected, strict=True):
            if tensor.shape != shape:
                raise CheckpointError(
                    f"has shape {tensor.shape}, but the metadata require {shape}", file=file, tensor=tensor.name
                )
        parameters[whole] = SplitKvB(halves, (heads * (nope + v_dim), rank))
