"""What a step has to read and to multiply, so that a measured speed can be held against what the machine can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .work import Work


@dataclass(frozen=True)
class Reads:
    """What decoding reads, in any engine.

    Attributes:
        weight_bytes: matrices read in a step, whatever its batch; of an embedding only the rows looked up are read: left out.
        kv_bytes: of the cache, a token of context.
    """

    weight_bytes: int
    kv_bytes: float

    def step_bytes(self, work: Work) -> float:
        """Read in a decode step half way through the output."""
        return self.weight_bytes + work.batch * self.kv_bytes * (work.depth + work.prompt + work.new / 2)

    def token_bytes(self, work: Work) -> float:
        """Read for each generated token: the weights' share falls with the batch."""
        return self.step_bytes(work) / work.batch


@dataclass(frozen=True)
class Traffic(Reads):
    """Attributes:
    weights: numbers in the matrices that every prompt token is multiplied with.
    head_weights: numbers in the output head, which the last token of a prompt alone needs.
    attention_width: numbers of all query heads of all layers together.
    """

    weights: int
    head_weights: int
    attention_width: int

    def prefill_operations(self, work: Work) -> float:
        """Multiplications and additions until the first tokens: matrices, the head once a row, causal attention."""
        tokens = work.prompt
        seen = tokens * work.depth + tokens * (tokens + 1) / 2  # (query, key) pairs
        return work.batch * (2 * self.weights * tokens + 2 * self.head_weights + 4 * self.attention_width * seen)


def traffic_of(model: Any) -> Traffic:
    """Of a Transformers model. What an optimised one reads is what its plan's steps say (`plan.describe()`), where they do."""
    from torch import nn

    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    head = model.get_output_embeddings()
    head_weights = head.in_features * head.out_features
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if "dso" in model.__dict__:
        from ..backends.base import BLOCK_TOKENS

        runtime = model.dso
        steps = [row["bytes"] for row in runtime.plan.describe() if row["op"] != "embedding" and "bytes" in row]
        kv_bytes: float = runtime.backend.block_bytes(runtime.graph, runtime.kv_dtype) / BLOCK_TOKENS
    else:
        steps = []
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        kv_bytes = 2 * config.num_hidden_layers * kv_heads * head_dim * model.dtype.itemsize
    return Traffic(
        weight_bytes=sum(steps or [m.weight.numel() * m.weight.element_size() for m in linears]),
        kv_bytes=kv_bytes,
        weights=sum(m.in_features * m.out_features for m in linears) - head_weights,
        head_weights=head_weights,
        attention_width=config.num_hidden_layers * config.num_attention_heads * head_dim,
    )
