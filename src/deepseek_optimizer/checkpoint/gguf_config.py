"""Conversion of GGUF metadata to a Transformers config, and of GGUF tensor names to parameter names.

Sources: llama.cpp's gguf-py/constants.py and convert_hf_to_gguf.py for the GGUF names; transformers/integrations/ggml.py for
Transformers' names.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, UnsupportedModelError
from .gguf_deepseek2 import LAYER as DEEPSEEK2_LAYER
from .gguf_deepseek2 import WHOLE, decoder_layers, deepseek2_config
from .gguf_header import GgufArray, GgufHeader
from .gguf_metadata import Metadata

# GGUF architecture -> (Transformers' model_type, class)
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "deepseek2": ("deepseek_v3", "DeepseekV3ForCausalLM"),  # or another of DeepSeek's classes: see gguf_deepseek2
}
ROPE_FACTORS = "rope_freqs.weight"  # llama3's scaling, as one factor per frequency
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    **DEEPSEEK2_LAYER,
}
_BLOCK = re.compile(r"blk\.(\d{1,5})\.([a-z_]+)\.(weight|bias)")


def parameter_name(name: str) -> str:
    """Transformers' name of a GGUF tensor, or the same name if there is none; the loader then reports it as unexpected."""
    if match := _BLOCK.fullmatch(name):
        layer, part, leaf = match.groups()
        if f"{part}.{leaf}" in WHOLE:
            return f"model.layers.{int(layer)}.{WHOLE[f'{part}.{leaf}']}"
        return f"model.layers.{int(layer)}.{_LAYER[part]}.{leaf}" if part in _LAYER else name
    part, _, leaf = name.rpartition(".")
    return f"{_TOP[part]}.{leaf}" if part in _TOP else name


def transformers_config(header: GgufHeader, path: Path, rope_factors: torch.Tensor | None) -> dict[str, Any]:
    """Returns the equivalent of the model's config.json.

    Args:
        header: of the file.
        path: the file, for errors.
        rope_factors: the values of `rope_freqs.weight`, if the file has it.

    Raises:
        UnsupportedModelError: the architecture is not supported.
        CheckpointError: a value is missing or invalid.
    """
    meta = Metadata(header, path)
    if meta.architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path}: GGUF architecture {meta.architecture!r} is not supported (supported: {', '.join(ARCHITECTURES)})"
        )
    model_type, model_class = ARCHITECTURES[meta.architecture]
    latent = meta.architecture == "deepseek2"
    layers = decoder_layers(meta) if latent else meta.integer(meta.of_model("block_count"))
    if f"blk.{layers - 1}.attn_norm.weight" not in header.tensors:
        raise meta.wrong(meta.of_model("block_count"), f"is {layers}, but the file has no block {layers - 1}")
    heads = meta.integer(meta.of_model("attention.head_count"))
    hidden = meta.integer(meta.of_model("embedding_length"))
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError("is missing or not a matrix", file=path, tensor="token_embd.weight")
    config: dict[str, Any] = {
        "architectures": [model_class],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": meta.integer(meta.of_model("feed_forward_length")),
        "max_position_embeddings": meta.integer(meta.of_model("context_length")),
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": meta.integer(meta.of_model("attention.head_count_kv"), heads),
        "rms_norm_eps": meta.number(meta.of_model("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(meta, rope_factors),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "vocab_size": embedding.shape[0],
    }
    if latent:
        config |= deepseek2_config(meta, config["rope_parameters"])
    else:
        config["head_dim"] = _head_dim(meta, hidden // heads)
    if model_type in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    for token in ("bos", "eos", "padding", "unknown"):
        key = f"tokenizer.ggml.{token}_token_id"
        if key in meta.values:
            short = {"padding": "pad", "unknown": "unk"}.get(token, token)
            config[f"{short}_token_id"] = meta.integer(key, minimum=0)
    return config


def _head_dim(meta: Metadata, default: int) -> int:
    key = meta.of_model("attention.key_length")
    if key not in meta.values and meta.architecture == "llama":
        key = meta.of_model("rope.dimension_count")
    return meta.integer(key, default)


def vocabulary_size(header: GgufHeader) -> int | None:
    """Number of tokens of the file's tokenizer; None if it has none."""
    tokens = header.values.get("tokenizer.ggml.tokens")
    return tokens.length if isinstance(tokens, GgufArray) else None


def _rope(meta: Metadata, factors: torch.Tensor | None) -> dict[str, Any]:
    theta = meta.number(meta.of_model("rope.freq_base"), 10000.0)
    kind = meta.text(meta.of_model("rope.scaling.type"), "none")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if factors is not None:
        return _llama3(meta, factors, theta)
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise meta.wrong(meta.of_model("rope.scaling.type"), f"is {kind!r}; 'none', 'linear' and 'yarn' are supported")
    rope |= {"rope_type": kind, "factor": meta.number(meta.of_model("rope.scaling.factor"))}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = meta.integer(meta.of_model("rope.scaling.original_context_length"))
        names = {"attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
        for key, field in names.items():
            if meta.of_model(f"rope.scaling.{key}") in meta.values:
                rope[field] = meta.number(meta.of_model(f"rope.scaling.{key}"))
    return rope


def _llama3(meta: Metadata, factors: torch.Tensor, theta: float) -> dict[str, Any]:
    """Recovers llama3's RoPE parameters from the factors in the file; each frequency is divided by its factor.

    Every published model has the bounds 1 and 4 over 8192 positions. These and the largest factor determine all factors, which
    are compared with those in the file.
    """
    low, high, original = 1.0, 4.0, 8192
    factor = float(factors.max())
    n = factors.numel()
    inverse = theta ** (-torch.arange(n, dtype=torch.float64, device="cpu") / n)
    rotations = original * inverse / (2 * math.pi)
    smooth = ((rotations - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth) if factor > 0 else torch.zeros_like(rotations)
    if not torch.allclose(expected, factors.double(), rtol=1e-3):
        raise CheckpointError("contains RoPE factors that are not llama3's", file=meta.path, tensor=ROPE_FACTORS)
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
