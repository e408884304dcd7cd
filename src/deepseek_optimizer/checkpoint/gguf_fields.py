"""Readers of config fields from the metadata of a GGUF file, for the table of architectures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..errors import UnsupportedModelError
from .gguf_metadata import Metadata

Reader = Callable[[Metadata], Any]


def count(key: str, default: int | None = None, minimum: int = 1) -> Reader:
    return lambda meta: meta.integer(meta.of_model(key), default, minimum)


def number(key: str, default: float | None = None) -> Reader:
    return lambda meta: meta.number(meta.of_model(key), default)


def optional(key: str) -> Reader:
    """A number, or None for a missing key or 0."""
    return lambda meta: meta.number(meta.of_model(key)) if meta.values.get(meta.of_model(key)) else None


def window(key: str = "attention.sliding_window", default: int = 0) -> Reader:
    """An integer, or None for a missing key or 0."""
    return lambda meta: meta.integer(meta.of_model(key), default, 0) or None


def stores(*tensors: str) -> Reader:
    """Whether any layer has one of the tensors."""
    return lambda meta: any(name.partition(".")[2].partition(".")[2] in tensors for name in meta.tensors)


def fixed(value: Any) -> Reader:
    return lambda meta: value


def head_dim(meta: Metadata) -> int:
    """Elements of a head."""
    heads = meta.integer(meta.of_model("attention.head_count"))
    default = meta.integer(meta.of_model("embedding_length")) // heads
    key = "attention.key_length"
    if not meta.has(key) and meta.architecture in ("llama", "mistral3"):
        key = "rope.dimension_count"
    return meta.integer(meta.of_model(key), default)


def sliding(period: int) -> Reader:
    """Types of layers: those of the file, or else the last of each `period` layers is not sliding."""

    def read(meta: Metadata) -> list[str]:
        key = "attention.sliding_window_pattern"
        given = meta.per_layer(key)
        if given is None or type(meta.values[meta.of_model(key)]) is int:  # a period
            every = period if given is None else given[0]
            given = [every == 0 or i % every < every - 1 for i in range(meta.layers)]
        return ["sliding_attention" if layer else "full_attention" for layer in given]

    return read


def windowed(period: int) -> Reader:
    """As `sliding`, but no layer is sliding if the file has no window."""
    return lambda meta: sliding(period)(meta) if has_window(meta) else ["full_attention"] * meta.layers


def recurrent(kind: str, attention: Callable[[Metadata], list[bool]]) -> Reader:
    """Types of layers, given which ones have attention."""
    return lambda meta: ["full_attention" if full else kind for full in attention(meta)]


def with_kv_heads(meta: Metadata) -> list[bool]:
    """For each layer, whether it has heads of keys and values."""
    return [heads > 0 for heads in meta.per_layer("attention.head_count_kv") or [1] * meta.layers]


def not_recurrent(meta: Metadata) -> list[bool]:
    """For each layer, whether it is not listed as recurrent; without a list, the last of each interval is not."""
    listed = meta.per_layer("attention.recurrent_layers")
    every = meta.integer(meta.of_model("full_attention_interval"), 4)
    return [not layer for layer in listed] if listed else [(layer + 1) % every == 0 for layer in range(meta.layers)]


def kv_heads(meta: Metadata) -> int:
    """Number of heads of the layers that have attention."""
    return max(meta.per_layer("attention.head_count_kv") or [0]) or meta.integer(meta.of_model("attention.head_count"))


def expert_width(meta: Metadata) -> int:
    """Width of an expert; where older files lack it, that of all used experts is the layer's."""
    key = "expert_feed_forward_length"
    default = None if meta.has(key) else count("feed_forward_length")(meta) // count("expert_used_count")(meta)
    return count(key, default)(meta)


def shared_width(meta: Metadata) -> int:
    """Width of the shared expert; where older files lack it, that of the layer."""
    return count("expert_shared_feed_forward_length", count("feed_forward_length")(meta))(meta)


def yarn_mscale(factor: float, multiplier: float) -> float:
    """YaRN's factor of cosines and sines for a context that is `factor` times as long (Peng et al. 2023)."""
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def growing_queries(meta: Metadata, rope: dict[str, Any]) -> dict[str, Any]:
    """The `rope_parameters` of Ministral 3: queries grow with the position, from YaRN's original context on.

    YaRN's own factor is divided by that for `yarn_log_multiplier`, which is Transformers' `mscale_all_dim`. Source: llama.cpp's
    conversion/mistral3.py, src/llama-context.cpp.
    """
    if rope["rope_type"] != "yarn":
        key = meta.of_model("attention.temperature_scale")
        raise UnsupportedModelError(f"{meta.path}: {key} is supported with rope.scaling.type 'yarn' only")
    parameters = rope | {"llama_4_scaling_beta": meta.number(meta.of_model("attention.temperature_scale"))}
    key = meta.of_model("rope.scaling.yarn_log_multiplier")
    if meta.values.get(key):
        own, multiplier = yarn_mscale(rope["factor"], 1.0), meta.number(key)
        parameters["attention_factor"] = parameters.get("attention_factor", own) / yarn_mscale(rope["factor"], multiplier)
    return {"rope_parameters": parameters}


def gemma_scale(layers: int) -> Reader:
    """`query_pre_attn_scalar`, which files lack: the size of a head, except in the largest model, which has `layers` layers."""

    def read(meta: Metadata) -> int:
        heads = meta.integer(meta.of_model("attention.head_count"))
        return meta.integer(meta.of_model("embedding_length")) // heads if meta.layers == layers else head_dim(meta)

    return read


def has_temperature(meta: Metadata) -> bool:
    return bool(meta.values.get(meta.of_model("attention.temperature_scale")))


def has_experts(meta: Metadata) -> bool:
    return meta.integer(meta.of_model("expert_count"), 0, minimum=0) > 0


def has_window(meta: Metadata) -> bool:
    return meta.integer(meta.of_model("attention.sliding_window"), 0, minimum=0) > 0
