"""Qwen3.5, the language model: three of four layers are gated delta nets, and MLPs are dense."""

from __future__ import annotations

from ..graph.ir import Graph, Node, Value
from .blocks import FeedForward, mlp
from .decoder import Decoder
from .fields import Fields
from .gated_delta import build_hybrid, project_separately

DEFAULT_SECTION = (11, 11, 10)  # of multimodal RoPE


def build(fields: Fields) -> Graph:
    return build_hybrid(fields, "qwen3_5_text", project_separately, _dense, axes=DEFAULT_SECTION)


def _dense(d: Decoder) -> FeedForward:
    def forward(nodes: list[Node], x: Value, layer: int) -> Value:
        return mlp(nodes, d, x, f"l{layer}.mlp", f"model.layers.{layer}.mlp", d.intermediate)

    return forward
