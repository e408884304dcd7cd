"""Granite 3 and 4, dense: Llama with factors for embeddings, scores, residuals and logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import MlpForm, read_decoder
from .fields import Fields


def build(fields: Fields) -> Graph:
    bias = fields.flag("attention_bias")
    decoder = read_decoder(fields, "granite", qkv_bias=bias, o_bias=bias, mlp=MlpForm(bias=fields.flag("mlp_bias")))
    return decoder_graph(replace(decoder, **granite_factors(fields)))


def granite_factors(fields: Fields) -> dict[str, Any]:
    """The factors as fields of `Decoder`."""
    return {
        "input_scale": fields.positive("embedding_multiplier"),
        "scale": fields.positive("attention_multiplier"),
        "residual_scale": fields.positive("residual_multiplier"),
        "logit_scale": 1 / fields.positive("logits_scaling"),
    }
