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
| rope | x, table | y | | heads, head_dim, interleaved, offset: numbers [offset, offset + rot) of a head turn |
| cache_write | k, v | | | layer, kv_heads, head_dim |
| attention | q, chosen where block-sparse | o | | layer, heads, kv_heads, head_dim, scale, window, softmax: "eager" or
"online", sinks (0 where left out) |
| swiglu | gate, up | h | | |
| add | x, y | z | | |
| select_rows | x | y (selected) | | |
| hidden_out | x | | | index |
| lm_head | x | logits | matrix [V, H] | bias: name or None |
| layer_norm | x | y | w, b | eps |
| concat | x, y | z: x, then y | | |
| state_in | | x | | | the step's `states`: hidden states of another plan, for an MTP layer |

A row that is token i of its sequence sees tokens j <= i; with a window those of i - j < window or j < sinks; block-sparse those
in its chosen blocks. `graph/attention_mode.py` puts in what makes the choice; softmax is "online" there:

| op | inputs | outputs | weights | attrs |
|---|---|---|---|---|
| block_choose | q [T, heads * head_dim] | chosen [T, kv_heads * blocks] | | layer, heads, kv_heads, head_dim, blocks, sinks,
window |
| latent_choose | q [T, heads * (nope + rope)] | chosen [T, 32 * blocks], for mla_attention | kv_b | layer, heads, nope, rope,
rank, v_dim, blocks, sinks, window |

Blocks are the cache's, of 32 tokens; the row sees n = i // 32 + 1 of them. n <= blocks: all are chosen. Otherwise blocks [0,
S), S = ceil(sinks / 32), and [W, n), W = max(0, i + 1 - window) // 32, are; of those between as many of the largest estimate
as make it `blocks` in all, of equal ones the earlier (S + ceil(window / 32) + 1 < blocks). The estimate of q head h and block
b bounds its logits (Tang et al. 2024, Quest): e = sum over d of max(q_d largest_d, q_d smallest_d), where largest and smallest
are those of the block's 32 keys as the cache holds them, rounded to bf16 unless it holds fp32 (its "summaries"). The heads of
a group share their blocks: what counts is the largest over its heads of e_h - (the largest e_h of the blocks between). Chosen
blocks are numbers of the sequence's blocks, ascending, as floats, -1 behind the last, kv head after kv head. latent_choose:
queries are absorbed, a key is a whole latent row, all heads are one group; out come the tokens j <= i of the chosen blocks.

Multi-head latent attention (DeepSeek-V2, section 2.1; its cache is a LatentSpec):

| op | inputs | outputs | weights | attrs |
|---|---|---|---|---|
| latent | kv_a, table | c, both [T, rank + rope] | w [rank] | eps, rank, interleaved |
| latent_write | c | | | layer |
| mla_attention | q [T, heads * (nope + rope)], chosen where sparse | o [T, heads * v_dim] | kv_b | layer, heads, nope, rope,
rank, v_dim, scale, form: "expanded" or "absorbed", window and sinks (0 where left out) |
| index_write | k [T, index] | | | layer |
| index_choose | q [T, heads * index], w [T, heads] | chosen [T, top_k] | | layer, heads, index, top_k, scale |

c is the norm of the first `rank` numbers of kv_a, then the others turned. Head h of q has its `nope` numbers first, then
`rope`, turned. kv_b is [heads * (nope + v_dim), rank]; its rows of head h are its `nope` key rows, then its `v_dim` value rows.
Expanded, keys and values of every head are made of the whole cache, as Transformers does it. Absorbed, of nothing: q_h kv_b_h
meets the latents as they are, and values are made of the weighted sum of latents; a backend may expand where that is cheaper,
in phase PREFILL only. `chosen`: numbers of tokens of the row's own sequence, ascending, as floats, -1 behind the last; a row
sees no others. `index_choose` takes the top_k visible tokens t of largest scale * sum over heads of w_h relu(q_h . k_t), all
where there are no more (DeepSeek-V3.2, section 2.1).

Experts (DeepSeekMoE; V3's report, section 2.1.2):

| op | inputs | outputs | weights | attrs |
|---|---|---|---|---|
| router | x | routes [T, 2 * top_k] | matrix [E, H], fp32 | bias: name of [E] or None; experts, top_k, groups, top_groups,
scoring: "softmax" or "sigmoid", group_score: "max" or "top2", normalise, scale |
| experts_gate_up | x, routes | h [T * top_k, I] | gate_up [E, 2 I, H]: gate over up | experts, top_k, grouped |
| experts_down | h, routes | y [T, H] | down [E, H, I] | experts, top_k, grouped |

`routes`: a token's chosen experts, ascending, as floats; then their weights. Row t * top_k + j of h (a value with
repeat=top_k) is silu(gate x) * (up x) of token t and its j-th chosen expert. y is the weighted sum over j, ascending.
`grouped`: a backend goes by experts instead of tokens, so that an expert's weights are read once; the numbers are the same.
Packed, gate_up is a stack of 2 E matrices [I, H] (gate and up of each expert in turn), down one of E.
Of equal scores (of experts, of groups, of tokens in `index_choose`) the lower number goes first.

The result is `lm_head`'s output. As a family builds a graph it has all T rows, and the backend hands out those asked for; rule
`last_logits` selects them before the final norm, so that the head runs on R rows only. Without `lm_head` (`without_head`) there
are no logits, `logit_rows` is empty, and the result is the last `hidden_out`.

Fused, made by `graph/rules`: `rope_cache` (q, k, v, table -> q), `add_rms_norm` (x, delta -> x', y), `gate_up` (x -> h;
weights gate, up; biases). A `linear` with several matrices is what rule `qkv` makes.

Order matters where a node reads the cache: nodes run in list order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Value:
    """One buffer of rows. `width`: elements a row. `selected`: rows are the logit rows instead of the tokens. `kind`: how a
    backend holds them; families and rules make "f32" only, a backend's lowering also "bf16", "q8", "q16". `repeat`: rows a
    token has."""

    name: str
    width: int
    selected: bool = False
    kind: str = "f32"
    repeat: int = 1


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
    """What one sequence keeps a token: per layer, K and V of `kv_heads` x `head_dim`; with `summaries`, of each full block of
    32 tokens besides the element-wise largest and smallest of its keys, for `block_choose`."""

    layers: int
    kv_heads: int
    head_dim: int
    summaries: bool = False

    @property
    def numbers(self) -> int:
        """Of one token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class LatentSpec:
    """What one sequence keeps a token under multi-head latent attention: per layer, a latent of `rank` numbers and a turned key
    of `rope` numbers that all heads share, and, with a lightning indexer, its key of `index` numbers (0: none).

    Layers beyond those of the graph belong to MTP layers, whose plans use the same blocks. `summaries`: as in CacheSpec, of
    latent rows, for `latent_choose`."""

    layers: int
    rank: int
    rope: int
    index: int = 0
    summaries: bool = False

    @property
    def numbers(self) -> int:
        """Of one token, all layers."""
        return self.layers * (self.rank + self.rope + self.index)


@dataclass
class Graph:
    """Nodes in execution order, with what the rest of the house must know about the model."""

    family: str
    nodes: list[Node]
    vocab_size: int
    hidden_size: int
    hidden_states: int  # how many hidden_out there are: layers + 1
    cache: CacheSpec | LatentSpec
    max_positions: int

    def consumers(self, value: Value) -> Iterator[tuple[int, Node]]:
        """Nodes that read `value`, with their index."""
        return ((i, n) for i, n in enumerate(self.nodes) if value in n.inputs)

    def producer(self, value: Value) -> Node | None:
        """The node that makes `value`."""
        return next((n for n in self.nodes if value in n.outputs), None)

    @property
    def has_head(self) -> bool:
        """Whether the graph computes logits."""
        return any(node.op == "lm_head" for node in self.nodes)

    def without_head(self) -> Graph:
        """The graph up to the final norm."""
        return replace(self, nodes=[node for node in self.nodes if node.op != "lm_head"])

    def renamed(self, name: Callable[[str], str]) -> Graph:
        """The graph with every weight's name, biases included, put through `name`."""
        return replace(self, nodes=[_renamed(node, name) for node in self.nodes])

    def weights(self) -> list[str]:
        """Every weight's name, biases included, once, in order of use."""
        names: dict[str, None] = {}
        for node in self.nodes:
            for name in (*node.weights, *node.attrs.get("biases", ()), node.attrs.get("bias")):
                if name is not None:
                    names[name] = None
        return list(names)


def _renamed(node: Node, name: Callable[[str], str]) -> Node:
    attrs = dict(node.attrs)
    if attrs.get("biases"):
        attrs["biases"] = tuple(None if bias is None else name(bias) for bias in attrs["biases"])
    if attrs.get("bias") is not None:
        attrs["bias"] = name(attrs["bias"])
    return node.with_(weights=tuple(map(name, node.weights)), attrs=attrs)
