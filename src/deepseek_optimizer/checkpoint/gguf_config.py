"""Conversion of GGUF metadata to a Transformers config, and of GGUF tensors to parameters.

Both follow the table in `gguf_architectures`. Sources: llama.cpp's gguf-py/constants.py and conversion/*.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError, UnsupportedModelError
from .gguf_architectures import ARCHITECTURES, LAYER, TOP, Architecture
from .gguf_fields import Reader, count, head_dim, yarn_mscale
from .gguf_header import GgufArray, GgufHeader, GgufTensor
from .gguf_metadata import Metadata
from .gguf_parameters import Parameter, halves_first

# Factors of RoPE's frequencies: llama3's scaling; longrope's, for long and for short texts.
ROPE_FREQS, ROPE_LONG, ROPE_SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_FACTORS = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)
_BLOCK = re.compile(r"blk\.(\d{1,5})\.(.+)")
_QKV = re.compile(r"blk\.(\d{1,5})\.attn_qkv\.(weight|bias)")

_COMMON: Mapping[str, Reader] = {
    "hidden_size": count("embedding_length"),
    "intermediate_size": count("feed_forward_length"),
    "max_position_embeddings": count("context_length"),
    "num_attention_heads": count("attention.head_count"),
    "num_hidden_layers": lambda meta: meta.layers,
    "num_key_value_heads": lambda meta: count("attention.head_count_kv", count("attention.head_count")(meta))(meta),
}


def architecture(meta: Metadata) -> Architecture:
    """The entry of the table for a file; UnsupportedModelError if there is none."""
    for entry in ARCHITECTURES.get(meta.architecture, ()):
        if entry.when(meta):
            return entry
    raise UnsupportedModelError(
        f"{meta.path}: GGUF architecture {meta.architecture!r} is not supported (supported: {', '.join(ARCHITECTURES)})"
    )


def transformers_config(meta: Metadata, entry: Architecture, factors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Returns the equivalent of the model's config.json.

    Args:
        meta: the file's metadata.
        entry: the file's architecture.
        factors: values of those of `ROPE_FACTORS` that the file has.

    Raises:
        UnsupportedModelError: a feature is not supported.
        CheckpointError: a value is missing or invalid.
    """
    last = f"blk.{meta.layers - 1}."
    if not any(name.startswith(last) for name in meta.tensors):
        raise meta.wrong(meta.of_model("block_count"), f"is {meta.layers}, but the file has no block {meta.layers - 1}")
    embedding = meta.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError("is missing or not a matrix", file=meta.path, tensor="token_embd.weight")
    model_type, model_class = entry.model
    rope = _rope(meta, entry, factors)
    config: dict[str, Any] = {
        "architectures": [f"{model_class}ForCausalLM"],
        "model_type": model_type,
        entry.activation[0]: entry.activation[1],
        entry.epsilon[0]: meta.number(meta.of_model(entry.epsilon[1])),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in meta.tensors,
        "vocab_size": embedding.shape[0],
        **{name: read(meta) for name, read in {**_COMMON, **entry.fields}.items()},
    }
    if entry.local_theta is not None:
        local = {"rope_type": "default", "rope_theta": entry.local_theta(meta)}
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    config |= entry.rest(meta, rope)
    for token, short in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):  # without the defaults of Transformers' classes
        key = f"tokenizer.ggml.{token}_token_id"
        config[f"{short}_token_id"] = meta.integer(key, minimum=0) if key in meta.values else None
    return config


def parameters(meta: Metadata, entry: Architecture, config: Mapping[str, Any]) -> dict[str, Parameter]:
    """The parameters that the tensors of a file contain, by Transformers' name.

    Raises:
        CheckpointError: two tensors are one parameter, or one does not have the shape that the config requires.
    """
    found: dict[str, Parameter] = {}
    for tensor in meta.tensors.values():
        parameter = Parameter((tensor,), tensor.shape)
        if entry.offset_norms and tensor.name.endswith("norm.weight") and _part(tensor) not in entry.unchanged:
            parameter = replace(parameter, convert=_minus_one)
        name = parameter_name(entry, tensor.name)
        if name in found:
            raise CheckpointError("contains two tensors for one parameter", file=meta.path, tensor=name)
        found[name] = parameter
    _split_qkv(found, config, meta.path)
    if entry.rope == "pairs":
        _permute_heads(found, config, meta.path)
    for rearrange in entry.rearrange:
        rearrange(found, config, meta.path)
    for name, parameter in found.items():
        if parameter.misshapen():
            stored = ", ".join(f"{source.name} {source.shape}" for source in parameter.sources)
            raise CheckpointError(
                f"has shape {parameter.shape}, which cannot be made of {stored}; convert the model again",
                file=meta.path,
                tensor=name,
            )
    return found


def parameter_name(entry: Architecture, name: str) -> str:
    """Transformers' name of a GGUF tensor, or the same name if there is none; the loader then reports it as unexpected."""
    match = _BLOCK.fullmatch(name)
    names = {**LAYER, **entry.names} if match else {**TOP, **entry.top}
    prefix, rest = (f"model.layers.{int(match[1])}.", match[2]) if match else ("", name)
    part, _, leaf = rest.rpartition(".")
    if rest in names:
        translated = names[rest]
    elif part in names and leaf in ("weight", "bias"):
        translated = f"{names[part]}.{leaf}"
    else:
        return name
    return prefix + (entry.mlp + translated[3:] if translated.startswith("mlp.") else translated)


def prediction_tensors(meta: Metadata) -> list[str]:
    """Names of the tensors of layers for multi-token prediction, which are not loaded."""
    if not meta.has("nextn_predict_layers"):
        return []
    return [name for name in meta.tensors if (match := _BLOCK.match(name)) and int(match[1]) >= meta.layers]


def _part(tensor: GgufTensor) -> str:
    """The name without layer and last component."""
    return tensor.name.split(".")[-2]


def _minus_one(values: torch.Tensor) -> torch.Tensor:
    return values - 1


def _split_qkv(found: dict[str, Parameter], config: Mapping[str, Any], path: Path) -> None:
    """Splits the joint projection of queries, keys and values that llama.cpp's converter writes on request (--fuse-qkv)."""
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"], "v": config["num_key_value_heads"]}
    for name, match in [(name, match) for name in found if (match := _QKV.fullmatch(name))]:
        layer, leaf = match.groups()
        whole, first = found.pop(name), 0
        if whole.shape[0] != sum(heads.values()) * size:
            raise CheckpointError(
                f"has {whole.shape[0]} rows for {sum(heads.values())} heads of {size}; convert the model again",
                file=path,
                tensor=name,
            )
        for part, number in heads.items():
            rows = np.arange(first, first + number * size)
            found[f"model.layers.{int(layer)}.self_attn.{part}_proj.{leaf}"] = replace(
                whole, shape=(len(rows), *whole.shape[1:]), order=rows
            )
            first += len(rows)


def _permute_heads(found: dict[str, Parameter], config: Mapping[str, Any], path: Path) -> None:
    """Undoes the permutation of the rows of q and k."""
    for name, parameter in found.items():
        part = name.partition(".self_attn.")[2].partition(".")[0]
        field = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(part)
        if field is None:
            continue
        heads, rows = config[field], parameter.shape[0]
        if rows % (2 * heads):
            raise CheckpointError(
                f"has {rows} rows for {heads} heads; every head must have the same, even number of rows", file=path, tensor=name
            )
        order = halves_first(heads, rows // heads, rows // heads)
        found[name] = replace(parameter, order=order if parameter.order is None else parameter.order[order])


def vocabulary_size(header: GgufHeader) -> int | None:
    """Number of tokens of the file's tokenizer; None if it has none."""
    tokens = header.values.get("tokenizer.ggml.tokens")
    return tokens.length if isinstance(tokens, GgufArray) else None


def _rope(meta: Metadata, entry: Architecture, factors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    theta = meta.number(meta.of_model("rope.freq_base"), 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if entry.partial and meta.has("rope.dimension_count"):
        rope["partial_rotary_factor"] = meta.integer(meta.of_model("rope.dimension_count")) / head_dim(meta)
    if ROPE_LONG in factors or ROPE_SHORT in factors:
        return rope | _longrope(meta, factors)
    if entry.frequencies is not None:
        rope |= entry.frequencies(meta, factors.get(ROPE_FREQS))
    else:
        rope |= _llama3(meta, factors[ROPE_FREQS], theta) if ROPE_FREQS in factors else _scaling(meta)
    if rope["rope_type"] != "yarn" and _attention_factor(meta) != 1.0:
        key = meta.of_model("rope.scaling.attn_factor")
        raise UnsupportedModelError(f"{meta.path}: {key} is supported with rope.scaling.type 'yarn' and 'longrope' only")
    return rope


def _attention_factor(meta: Metadata) -> float:
    """The factor by which llama.cpp multiplies cosines and sines in addition to the type's own."""
    return meta.number(meta.of_model("rope.scaling.attn_factor"), 1.0)


def _scaling(meta: Metadata) -> dict[str, Any]:
    kind = meta.text(meta.of_model("rope.scaling.type"), "none")
    if kind in ("none", "longrope"):
        return {}
    if kind not in ("linear", "yarn"):
        raise meta.wrong(meta.of_model("rope.scaling.type"), f"is {kind!r}; 'none', 'linear' and 'yarn' are supported")
    rope: dict[str, Any] = {"rope_type": kind, "factor": meta.number(meta.of_model("rope.scaling.factor"))}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = meta.integer(meta.of_model("rope.scaling.original_context_length"))
        for field in ("beta_fast", "beta_slow"):
            if meta.has(f"rope.scaling.yarn_{field}"):
                rope[field] = meta.number(meta.of_model(f"rope.scaling.yarn_{field}"))
        if _attention_factor(meta) != 1.0:
            rope["attention_factor"] = _attention_factor(meta) * yarn_mscale(rope["factor"], 1.0)
    return rope


def _longrope(meta: Metadata, factors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    for name in (ROPE_LONG, ROPE_SHORT):
        if name not in factors:
            raise CheckpointError("is missing, but the file has the other factors of RoPE", file=meta.path, tensor=name)
    original = meta.integer(meta.of_model("rope.scaling.original_context_length"))
    return {
        "rope_type": "longrope",
        "factor": meta.integer(meta.of_model("context_length")) / original,
        "original_max_position_embeddings": original,
        "long_factor": factors[ROPE_LONG].tolist(),
        "short_factor": factors[ROPE_SHORT].tolist(),
        "attention_factor": _attention_factor(meta),  # there is no other one in llama.cpp
    }


def _llama3(meta: Metadata, factors: torch.Tensor, theta: float) -> dict[str, Any]:
    """Recovers llama3's RoPE parameters from the factors in the file; each frequency is divided by its factor.

    Every published model has the bounds 1 and 4 over 8192 positions, except Llama 4, which has 1 and 1. These and the largest
    factor determine all factors, which are compared with those in the file.
    """
    low, original = 1.0, 8192
    factor = float(factors.max())
    n = factors.numel()
    inverse = theta ** (-torch.arange(n, dtype=torch.float64, device="cpu") / n)
    rotations = original * inverse / (2 * math.pi)
    for high in (4.0, 1.0):
        smooth = ((rotations - low) / (high - low)).clamp(0, 1) if high > low else (rotations >= low).double()
        expected = 1 / ((1 - smooth) / factor + smooth) if factor > 0 else torch.zeros_like(rotations)
        if torch.allclose(expected, factors.double(), rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise CheckpointError("contains RoPE factors that are not llama3's", file=meta.path, tensor=ROPE_FREQS)
