"""Gemma 4 unified, the language model: Gemma 4 without embeddings per layer and without experts."""

from __future__ import annotations

from ..graph.ir import Graph
from .fields import Fields
from .gemma4_text import build_text


def build(fields: Fields) -> Graph:
    return build_text(fields, "gemma4_unified_text", layer_inputs=False, moe=False)
