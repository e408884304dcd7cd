"""DeepSeek-V2, V2-Lite, Coder-V2: latent attention, softmax router."""

from __future__ import annotations

from ..errors import ConfigError
from ..graph.ir import Graph
from .blocks import trunk_graph
from .experts import feed_forward, first_dense, read_softmax_routing
from .fields import Fields
from .mla import attention, read_latent_decoder


def build(fields: Fields) -> Graph:
    d = read_latent_decoder(fields, "deepseek_v2", interleaved=True, mlp_bias=fields.flag("mlp_bias"))
    if d.hidden % d.heads:  # not needed here, but Transformers' config class requires it
        raise ConfigError(f"config.num_attention_heads: {d.heads} does not divide hidden_size {d.hidden}")
    sparse = first_dense(fields, d.layers)
    routing = read_softmax_routing(fields, d.hidden) if any(sparse) else None
    return trunk_graph(d, d.cache, attention(d), feed_forward(d, routing, sparse))
