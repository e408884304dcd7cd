"""The graph: values, nodes, and the standard ops.

A graph describes ONE ragged step of a decoder: T token rows (no padding), of which R rows want logits. It names weights by
their module path in the Transformers model (`model.layers.0.self_attn.q_proj.weight`), and never holds them.

Ops, inputs -> outputs; all values are float rows [T, width] unless `selected` ([R, width]):

| op | inputs | outputs | weights | attrs |
|---|---|---|---|---|
| embedding | | x | table [V, H] | scale |
| rms_norm | x | y | w | eps |
| head_norm | x | y | w [head_dim] | eps, heads, head_dim |
| linear | x | y1.. yn | n matrices [N_i, K] over one input | biases: tuple of names or None |
| rope_table | | table [T, rot]: cos, then sin | | rope: models.rope.RopeSpec |
| rope | x, table | y | | heads, head_dim, interleaved |
| cache_write | k, v | | | layer, kv_heads, head_dim |
| attention | q | o | | layer, heads, kv_heads, head_dim, scale, window, softmax: "eager" or "online" |
| swiglu | gate, up | h | | |
| add | x, y | z | | |
| select_rows | x | y (selected) | | |
| hidden_out | x | | | index |
| lm_head | x | logits | matrix [V, H] | bias: name or None |

The result is `lm_head`'s output. As a family builds a graph it has all T rows, and the backend hands out those asked for; rule
`last_logits` selects them before the final norm, so that the head runs on R rows only.

Fused, made by `graph/rules`: `rope_cache` (q, k, v, table -> q), `add_rms_norm` (x, delta -> x', y), `gate_up` (x -> h;
weights gate, up; biases). A `linear` with several matrices is what rule `qkv` makes.

Order matters where a node reads the cache: nodes run in list order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Value:
    """One buffer of rows. `width`: elements a row. `selected`: rows are the logit rows instead of the tokens. `kind`: how a
    backend holds them; families and rules make "f32" only, a backend's lowering also "bf16", "q8", "q16"."""

    name: str
    width: int
    selected: bool = False
    kind: str = "f32"


@dataclass(frozen=True)
class Node:
    """One op. `weights` are names of parameters; `attrs` are plain numbers, strings, tuples or a RopeSpec."""

    op: str
    inputs: tuple[Value, ...] = ()
    outputs: tuple[Value, ...] = ()
    weights: tuple[str, ...] = ()
    attrs: dict[str, Any] = field(default_factory=dict)

    def with_(self, **changes: Any) -> Node:
        return replace(self, **changes)


@dataclass(frozen=True)
class CacheSpec:
    """What one sequence keeps a token: per layer, K and V of `kv_heads` x `head_dim`."""

    layers: int
    kv_heads: int
    head_dim: int


@dataclass
class Graph:
    """Nodes in execution order, with what the rest of the house must know about the model."""

    family: str
    nodes: list[Node]
    vocab_size: int
    hidden_size: int
    hidden_states: int  # how many hidden_out there are: layers + 1
    cache: CacheSpec
    max_positions: int

    def consumers(self, value: Value) -> Iterator[tuple[int, Node]]:
        """Nodes that read `value`, with their index."""
        return ((i, n) for i, n in enumerate(self.nodes) if value in n.inputs)

    def producer(self, value: Value) -> Node | None:
        """The node that makes `value`."""
        return next((n for n in self.nodes if value in n.outputs), None)

    def weights(self) -> list[str]:
        """Every weight's name, biases included, once, in order of use."""
        names: dict[str, None] = {}
        for node in self.nodes:
            for name in (*node.weights, *node.attrs.get("biases", ()), node.attrs.get("bias")):
                if name is not None:
                    names[name] = None
        return list(names)
