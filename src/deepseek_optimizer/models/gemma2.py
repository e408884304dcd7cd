"""Gemma 2: Gemma with norms around attention and MLP, limited scores and logits, and windows in every other layer."""

from __future__ import annotations

from dataclasses import replace

from ..graph.ir import Graph
from .attention import decoder_graph
from .decoder import read_layer_types, windows_of
from .fields import Fields
from .gemma import SANDWICH_NORMS, read_gemma, softcap


def build(fields: Fields) -> Graph:
    decoder = read_gemma(fields, "gemma2")
    kinds = read_layer_types(fields, decoder.layers, lambda layer: layer % 2 == 0)
    return decoder_graph(
        replace(
            decoder, layer_norms=SANDWICH_NORMS, windows=windows_of(fields, kinds),
            scale=fields.positive("query_pre_attn_scalar") ** -0.5, attention_softcap=softcap(fields, "attn_logit_softcapping"),
            logit_softcap=softcap(fields, "final_logit_softcapping"),
        )
    )  # fmt: skip
