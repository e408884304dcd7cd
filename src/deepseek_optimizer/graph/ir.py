"""The graph: values, nodes, and the sizes of a model that the rest of the library needs.

A graph describes one step of a decoder over T token rows, without padding, of which R rows are selected for logits; or one of
an encoder over whole sequences. It names weights by their module path in the Transformers model
(`model.layers.0.self_attn.q_proj.weight`) and never holds them. The ops are described by `graph/ops`, one `OpSpec` each;
`python -m deepseek_optimizer.graph.ops` prints them.

Model families build graphs over all T rows, and the backend returns the logits that were requested; rule `last_logits` selects
those rows before the final norm, so that the head runs on R rows only. The result is the output of `lm_head`. Without that op
(`without_head`) there are no logits, `logit_rows` is empty, and the result is the last `hidden_out`.

Nodes run in list order, which matters where they read or write the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

BLOCK = 32  # tokens in a block of the cache


@dataclass(frozen=True)
class Value:
    """One buffer of rows.

    Attributes:
        width: elements per row.
        selected: whether the rows are the selected rows, whose logits are requested, instead of all tokens.
        kind: how a backend stores them. Families and rules use "f32" only, a backend's lowering also "bf16", "q8" and "q16".
        repeat: rows per token.
    """

    name: str
    width: int
    selected: bool = False
    kind: str = "f32"
    repeat: int = 1


@dataclass(frozen=True)
class Node:
    """One use of an op, as `graph.ops.OPS[op]` specifies it.

    Attributes:
        weights: names of parameters. Those of biases are in the attributes `bias` and `biases`.
        attrs: plain numbers, strings, tuples or a RopeSpec.
    """

    op: str
    inputs: tuple[Value, ...] = ()
    outputs: tuple[Value, ...] = ()
    weights: tuple[str, ...] = ()
    attrs: dict[str, Any] = field(default_factory=dict)

    def with_(self, **changes: Any) -> Node:
        return replace(self, **changes)


@dataclass(frozen=True)
class CacheSpec:
    """The contents of the cache per token: in each layer, a key and a value of `kv_heads` x `head_dim` elements.

    Attributes:
        layers: the layers that write keys and values. Layers without attention do not count, nor do layers whose attention
            reads the cache of another layer.
        kv_heads, head_dim: one number for all layers, or a tuple with one per layer.
        summaries: whether the cache also holds the element-wise maximum and minimum of the keys of each full block, for
            `block_choose`.
        layer_groups: the group of each layer, from 0 without gaps (see `cache_groups`); (): all are in group 0, as they must be
            with summaries. A block holds 32 tokens of the layers of one group.
        newest: attention reads each sequence's last `newest` tokens from copies of the layers in int8; 0: there are none.
        newest_groups: the group of each layer's copy, numbered after those of the layers; () without copies.
    """

    layers: int
    kv_heads: int | tuple[int, ...]
    head_dim: int | tuple[int, ...]
    summaries: bool = False
    layer_groups: tuple[int, ...] = ()
    newest: int = 0
    newest_groups: tuple[int, ...] = ()

    @property
    def groups(self) -> int:
        """Number of groups of layers, those of copies included."""
        return max((*self.layer_groups, *self.newest_groups), default=0) + 1

    @property
    def own_groups(self) -> int:
        """Number of groups of layers, without those of copies; they come first."""
        return max(self.layer_groups, default=0) + 1

    def group_of(self, layer: int) -> int:
        """The group that a layer is in."""
        return self.layer_groups[layer] if self.layer_groups else 0

    def heads_of(self, layer: int) -> tuple[int, int]:
        """(kv_heads, head_dim) of a layer."""
        kv_heads, head_dim = self.kv_heads, self.head_dim
        return (
            kv_heads[layer] if isinstance(kv_heads, tuple) else kv_heads,
            head_dim[layer] if isinstance(head_dim, tuple) else head_dim,
        )

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """(kv_heads, head_dim) of every layer."""
        return tuple(map(self.heads_of, range(self.layers)))

    def elements_of(self, layer: int) -> int:
        """Number of elements of a token in one layer."""
        kv_heads, head_dim = self.heads_of(layer)
        return 2 * kv_heads * head_dim

    @property
    def elements_per_token(self) -> int:
        """Number of elements in all layers."""
        return sum(map(self.elements_of, range(self.layers)))


NO_CACHE = CacheSpec(0, 0, 0)  # of encoders: a step holds whole sequences, and nothing is kept after it


@dataclass(frozen=True)
class LatentSpec:
    """The contents of the cache per token with multi-head latent attention: in each layer, a latent of `rank` elements and a
    rotated key of `rope` elements that all heads share; with a lightning indexer also its key of `index` elements (0: no
    indexer).

    Layers beyond those of the graph belong to MTP layers, whose plans use the same blocks. `summaries`: as in CacheSpec, of
    latents with their rotated keys, for `latent_choose`."""

    layers: int
    rank: int
    rope: int
    index: int = 0
    summaries: bool = False
    groups = own_groups = 1
    newest = 0
    newest_groups: ClassVar[tuple[int, ...]] = ()

    def group_of(self, layer: int) -> int:
        """The group that a layer is in: all are in one."""
        return 0

    @property
    def elements_per_token(self) -> int:
        """Number of elements in all layers."""
        return self.layers * (self.rank + self.rope + self.index)


@dataclass(frozen=True)
class CachedRows:
    """One kind of rows in the cache of a model with compressed attention.

    Attributes:
        width: elements of a row.
        every: number of tokens that share a row, which is stored with the last of them; 1: each token has its own.
        window: number of last tokens whose rows are read; 0: all.
        rounded: whether rows are stored in the cache's dtype; otherwise in bf16, or in fp32 if that is the cache's dtype.
    """

    width: int
    every: int = 1
    window: int = 0
    rounded: bool = True

    @property
    def places(self) -> int:
        """Rows in a block of 32 tokens. The row of tokens that end with token t is row t % 32 // every of the block of t."""
        return (BLOCK - 1) // self.every + 1


@dataclass(frozen=True)
class RowsSpec:
    """The contents of the cache with compressed attention (DeepSeek-V4): rows of several kinds, which nodes name by their index
    (attribute `layer`).

    Nothing else is kept: the rows that a window of tokens is compressed from are those of its tokens, so a sequence can be
    cropped to any length, and a prefix continued after any block.

    Attributes:
        rows: the kinds.
        row_groups: the group of each kind, from 0 without gaps (see `cache_groups`); (): all are in group 0.
    """

    rows: tuple[CachedRows, ...]
    row_groups: tuple[int, ...] = ()
    summaries: ClassVar[bool] = False
    newest: ClassVar[int] = 0
    newest_groups: ClassVar[tuple[int, ...]] = ()

    @property
    def layers(self) -> int:
        """Number of kinds."""
        return len(self.rows)

    @property
    def groups(self) -> int:
        """Number of groups of kinds."""
        return max(self.row_groups, default=0) + 1

    own_groups = groups

    def group_of(self, layer: int) -> int:
        """The group that a kind is in."""
        return self.row_groups[layer] if self.row_groups else 0

    @property
    def elements_per_token(self) -> int:
        """Number of elements in all kinds, rounded up: of a token in the middle of a long text."""
        return -(-sum(BLOCK * rows.width // rows.every for rows in self.rows) // BLOCK)


@dataclass(frozen=True)
class StateSpec:
    """A recurrent state: a float32 tensor of this shape per sequence, whatever its length. A new sequence's state is zero.

    A backend may store it in another layout."""

    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class LatentHeads:
    """What a site in latent attention changes: in the keys or the values of every head, kv_b [heads * (nope + v_dim), rank].

    Attributes:
        keys: the products K_h^T q_h of absorbed attention, with the key rows K_h [nope, rank] of a head; otherwise V_h s_h,
            with its value rows V_h [v_dim, rank].
    """

    heads: int
    nope: int
    v_dim: int
    keys: bool


@dataclass(frozen=True)
class AdapterSite:
    """A product that low-rank adapters may change.

    Attributes:
        module: path of its module in the Transformers model, `model.layers.0.self_attn.q_proj`.
        inputs, outputs: elements per row of its input and of its result; with `latent`, of one head.
        rows: (begin, end, total): its outputs are these rows of the module's matrix; None: all of them.
        latent: the product is one per head, of latent attention.
    """

    module: str
    inputs: int
    outputs: int
    rows: tuple[int, int, int] | None = None
    latent: LatentHeads | None = None

    @property
    def heads(self) -> int:
        """Number of products."""
        return 1 if self.latent is None else self.latent.heads

    @property
    def module_shape(self) -> tuple[int, int]:
        """(outputs, inputs) of the module's matrix."""
        if self.latent is not None:
            rank = self.outputs if self.latent.keys else self.inputs
            return self.latent.heads * (self.latent.nope + self.latent.v_dim), rank
        return self.outputs if self.rows is None else self.rows[2], self.inputs

    def pair_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of an adapter's A [rank, inputs] and B [outputs, rank]. In latent attention, each head has its own A for
        keys, or its own B for values."""
        down, up = (rank, self.inputs), (self.outputs, rank)
        if self.latent is None:
            return down, up
        return ((self.heads, *down), up) if self.latent.keys else (down, (self.heads, *up))


@dataclass
class Graph:
    """Nodes in execution order, and the sizes of the model.

    Attributes:
        states: the recurrent states of a sequence. A node names its own by its index (attribute `state`).
        adapter_sites: products that adapters may change. A node names its own by its index (attribute `site`).
        written: layers of the cache that another plan has written in earlier steps.
        draft_vocab_size: number of tokens that the head has a row for, if these are not all tokens; None: `vocab_size`.
    """

    family: str
    nodes: list[Node]
    vocab_size: int
    hidden_size: int
    hidden_states: int  # number of hidden_out nodes: layers + 1
    cache: CacheSpec | LatentSpec | RowsSpec
    max_positions: int
    states: tuple[StateSpec, ...] = ()
    adapter_sites: tuple[AdapterSite, ...] = ()
    written: tuple[int, ...] = ()
    draft_vocab_size: int | None = None

    @property
    def draft_width(self) -> int:
        """Elements per row of the states that MTP layers take (`draft_out`)."""
        return next((n.inputs[0].width for n in self.nodes if n.op == "draft_out"), self.hidden_size)

    @property
    def logits_width(self) -> int:
        """Number of logits of a row."""
        return self.draft_vocab_size or self.vocab_size

    def producer(self, value: Value) -> Node | None:
        """The node that computes `value`."""
        return next((n for n in self.nodes if value in n.outputs), None)

    @property
    def has_head(self) -> bool:
        """Whether the graph computes logits."""
        return any(node.op == "lm_head" for node in self.nodes)

    @property
    def logits(self) -> Value | None:
        """The logits: the result of `lm_head`, or of the `all_gather` that joins its parts; None: there is no head."""
        head = next((node.outputs[0] for node in self.nodes if node.op == "lm_head"), None)
        return next((node.outputs[0] for node in self.nodes if node.op == "all_gather" and head in node.inputs), head)

    @property
    def looks_up(self) -> bool:
        """Whether steps need token ids even if they have `inputs_embeds`."""
        return any(node.op in ("lookup", "hash_router") for node in self.nodes)

    @property
    def features(self) -> int:
        """Number of `add_features` nodes, whose indices count them."""
        return sum(node.op == "add_features" for node in self.nodes)

    def without_head(self) -> Graph:
        """The graph up to the final norm."""
        return replace(self, nodes=[node for node in self.nodes if node.op != "lm_head"])

    def renamed(self, name: Callable[[str], str]) -> Graph:
        """The graph with `name` applied to the name of every weight, biases included."""
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
