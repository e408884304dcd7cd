"""Qwen3-Next: three of four layers are gated delta nets, and MLPs have experts, of which one is shared and weighted."""

from __future__ import annotations

from ..graph.ir import Graph
from .blocks import FeedForward
from .decoder import MAX_WIDTH, Decoder
from .experts import feed_forward, read_plain_routing, sparse_by_step
from .fields import Fields
from .gated_delta import build_hybrid, project_by_head


def build(fields: Fields) -> Graph:
    def experts(d: Decoder) -> FeedForward:
        sparse = sparse_by_step(fields, d.layers)
        return shared_experts(fields, d, sparse, normalize=fields.flag("norm_topk_prob"))

    return build_hybrid(fields, "qwen3_next", project_by_head, experts)


def shared_experts(fields: Fields, d: Decoder, sparse: tuple[bool, ...], *, normalize: bool) -> FeedForward:
    """Feed-forward networks with experts, of which one is shared and weighted by a sigmoid.

    Args:
        fields: the config.
        d: the model's sizes.
        sparse: whether each layer has experts.
        normalize: whether the weights of the chosen experts are divided by their sum.
    """
    routing = read_plain_routing(
        fields, d.hidden, width="moe_intermediate_size", normalize=normalize,
        shared=fields.integer("shared_expert_intermediate_size", MAX_WIDTH), shared_module="shared_expert",
        shared_gate="shared_expert_gate",
    )  # fmt: skip
    return feed_forward(d, routing, sparse)
