"""GGUF's `gemma4`, the language model of Gemma 4.

Full layers have heads of another size than sliding ones, and often fewer key heads, and the MLPs of layers that read the keys
and values of others may be twice as wide, so the file has lists for these. The full layers' RoPE rotates the first part of a
head; the file marks the other pairs by a factor of 1e30 in `rope_freqs.weight`. Attention is never scaled (llama.cpp sets
`f_attention_scale` to 1), and each layer's output is multiplied by `layer_output_scale`.

Source: llama.cpp's conversion/gemma.py (Gemma4Model), src/models/gemma4.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .gguf_fields import count, expert_width, has_experts, optional, sliding, window
from .gguf_metadata import Metadata
from .gguf_parameters import Parameter

NAMES: Mapping[str, str] = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm": "post_feedforward_layernorm",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_exps.weight": "experts.gate_proj",
    "ffn_up_exps.weight": "experts.up_proj",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
}
TOP: Mapping[str, str] = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_NOT_ROTATED = 1e30  # the factor of such a pair; 1 that of a rotated one


def gemma4_config(meta: Metadata, rope: dict[str, Any]) -> dict[str, Any]:
    """Config fields besides the common ones.

    Raises:
        CheckpointError: a value is missing or invalid, or layers of one type differ.
    """
    kinds = sliding(6)(meta)
    kinds[-1] = _FULL  # as in Transformers' config class
    shared = meta.integer(meta.of_model("attention.shared_kv_layers"), 0, minimum=0)
    own = [i for i, kind in enumerate(kinds) if kind == _FULL and i < meta.layers - shared]
    kv_heads = _by_type(meta, "attention.head_count_kv", kinds)
    width = count("embedding_length_per_layer_input", 0, 0)(meta)
    config: dict[str, Any] = {
        "attention_bias": any(name.endswith(".attn_q.bias") for name in meta.tensors),
        "attention_k_eq_v": any(f"blk.{i}.attn_v.weight" not in meta.tensors for i in own),
        "enable_moe_block": has_experts(meta),
        "final_logit_softcapping": optional("final_logit_softcapping")(meta),
        "global_head_dim": count("attention.key_length")(meta),
        "head_dim": count("attention.key_length_swa")(meta),
        "hidden_size_per_layer_input": width,
        "layer_types": kinds,
        "num_global_key_value_heads": kv_heads.get(_FULL),
        "num_key_value_heads": kv_heads.get(_SLIDING, kv_heads.get(_FULL)),
        "num_kv_shared_layers": shared,
        "sliding_window": window()(meta),
        **_widths(meta, shared),
    }
    if width:
        table = meta.tensors.get("per_layer_token_embd.weight")
        if table is None or len(table.shape) != 2:
            raise CheckpointError("is missing or not a matrix", file=meta.path, tensor="per_layer_token_embd.weight")
        config["vocab_size_per_layer_input"] = table.shape[0]
    if has_experts(meta):
        config |= {
            "num_experts": count("expert_count")(meta),
            "top_k_experts": count("expert_used_count")(meta),
            "moe_intermediate_size": expert_width(meta),
        }
    return config


def proportional(meta: Metadata, factors: torch.Tensor | None) -> dict[str, Any]:
    """The full layers' entries of `rope_parameters`, from the factors of frequencies.

    Raises:
        CheckpointError: the factors are missing, or do not mark the first pairs of a head as rotated, and the others not.
    """
    if factors is None:
        raise CheckpointError("is missing", file=meta.path, tensor="rope_freqs.weight")
    rotated = int((factors == 1).sum())
    if not (rotated and bool((factors[:rotated] == 1).all()) and bool((factors[rotated:] >= 0.99 * _NOT_ROTATED).all())):
        raise CheckpointError("contains RoPE factors that are not Gemma 4's", file=meta.path, tensor="rope_freqs.weight")
    return {"rope_type": "proportional", "partial_rotary_factor": rotated / factors.numel()}


def drop_shared(parameters: dict[str, Parameter], config: Mapping[str, Any], path: Path) -> None:
    """Removes the keys and values of layers that read those of others, which some files have though nothing uses them."""
    first = config["num_hidden_layers"] - config["num_kv_shared_layers"]
    for layer in range(first, config["num_hidden_layers"]):
        for part in ("k_proj", "v_proj", "k_norm"):
            for leaf in ("weight", "bias"):
                parameters.pop(f"model.layers.{layer}.self_attn.{part}.{leaf}", None)


def _widths(meta: Metadata, shared: int) -> dict[str, Any]:
    """`intermediate_size`, and whether MLPs of layers that share keys and values are twice as wide."""
    widths = meta.per_layer("feed_forward_length")
    if widths is None:
        raise meta.wrong(meta.of_model("feed_forward_length"), "is missing")
    double = bool(shared) and widths[-1] == 2 * widths[0]
    first = meta.layers - shared
    expected = [widths[0] * (2 if double and layer >= first else 1) for layer in range(meta.layers)]
    if widths[: meta.layers] != expected or not widths[0]:
        raise meta.wrong(
            meta.of_model("feed_forward_length"),
            f"must be one width, doubled for the last {shared} layers or not, not {widths!r}",
        )
    return {"intermediate_size": widths[0], "use_double_wide_mlp": double}


def _by_type(meta: Metadata, key: str, kinds: list[str]) -> dict[str, int]:
    """The value of a key for the layers of each type."""
    values = meta.per_layer(key)
    if values is None:
        raise meta.wrong(meta.of_model(key), "is missing")
    found = dict(zip(kinds, values, strict=False))
    if any(found[kind] != value or not value for kind, value in zip(kinds, values, strict=False)):
        raise meta.wrong(meta.of_model(key), f"must be the same, at least 1, in all layers of a type, not {values!r}")
    return found
