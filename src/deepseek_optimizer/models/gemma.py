"""Gemma: RMS norms with the factor 1 + w, GeGLU, scaled embeddings. Source: Gemma Team 2024."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import UnsupportedModelError
from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import Decoder, LayerNorms, MlpForm, read_decoder
from .fields import Fields

SANDWICH_NORMS = LayerNorms(
    attention_out="post_attention_layernorm", mlp_in="pre_feedforward_layernorm", mlp_out="post_feedforward_layernorm"
)


def build(fields: Fields) -> Graph:
    # "gelu" stands for the approximation by tanh in the first checkpoints, as in Transformers.
    activation = "hidden_act" if fields.get("hidden_act") != "gelu" else "hidden_activation"
    if activation == "hidden_activation" and fields.get(activation) is None:
        return decoder_graph(read_gemma(fields, "gemma", activation=None))
    return decoder_graph(read_gemma(fields, "gemma", activation=activation))


def read_gemma(fields: Fields, family: str, activation: str | None = "hidden_activation", **options: Any) -> Decoder:
    """Reads what all versions share; `options`: further arguments of `read_decoder`."""
    if fields.get("use_bidirectional_attention"):
        raise UnsupportedModelError("config.use_bidirectional_attention: only causal attention is supported")
    bias = fields.flag("attention_bias")
    decoder = read_decoder(
        fields, family, qkv_bias=bias, o_bias=bias, mlp=MlpForm(activation="gelu"), activation=activation, **options
    )
    return replace(decoder, norm="rms_offset", embedding_scale=rounded_scale(decoder.hidden**0.5, fields.get("dtype")))


def softcap(fields: Fields, name: str) -> float:
    """A limit of scores or logits; 0 if the field is None."""
    return 0.0 if fields.get(name) is None else fields.positive(name)


def rounded_scale(scale: float, dtype: Any) -> float:
    """The factor of embeddings in the model's dtype, as Transformers multiplies: 34 instead of 33.94 in bfloat16."""
    name = str(dtype).removeprefix("torch.")
    if name == "bfloat16":
        bits = np.float32(scale).view(np.uint32)
        return float(((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32))
    return float(np.float16(scale)) if name == "float16" else float(np.float32(scale))
