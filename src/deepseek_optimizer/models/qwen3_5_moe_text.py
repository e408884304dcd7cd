"""Qwen3.5 with experts, the language model: as Qwen3-Next, with separate input projections and experts in every layer."""

from __future__ import annotations

from ..graph.ir import Graph
from .blocks import FeedForward
from .decoder import Decoder
from .fields import Fields
from .gated_delta import build_hybrid, project_separately
from .qwen3_5_text import DEFAULT_SECTION
from .qwen3_next import shared_experts


def build(fields: Fields) -> Graph:
    def experts(d: Decoder) -> FeedForward:
        return shared_experts(fields, d, (True,) * d.layers, normalize=True)

    return build_hybrid(fields, "qwen3_5_moe_text", project_separately, experts, "moe_intermediate_size", DEFAULT_SECTION)
