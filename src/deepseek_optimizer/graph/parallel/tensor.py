"""Divides every layer of a decoder among processes (tensor parallelism, Shoeybi et al. 2019; expert parallelism, Lepikhin et
al. 2020).

Products whose input is whole are divided by rows of their matrices, so that each process has some heads and some elements of
the MLP. Products that read those are divided by columns, and `all_reduce` adds their results. The head is divided by rows, that
is by tokens of the vocabulary, and `all_gather` joins the logits. Everything else is the same in all processes, bit for bit:
also latents of keys, values and queries, so with latent attention each process has the whole cache.

Routed experts are divided in two ways at once. Each of `experts` groups of processes has some of them, and the processes of a
group each have some elements of these. A process computes its own ones, and `all_reduce` adds their results. Results that are
added to each other are added before that, in each process.

The rule takes a graph before or after the fusion rules; it divides the weights in the same way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...errors import ConfigError, UnsupportedModelError
from ..ir import CacheSpec, Graph, LatentSpec, Node, RowsSpec, Value
from ..ops.products import rows_of
from .parallel import Parallel
from .shard import Part, Shard, Span, UnitsOf, even_spans

# Ops that compute each element, or each head, of their outputs from the same one of their inputs.
_DIVISIBLE = frozenset(
    {
        "swiglu", "geglu", "gelu", "gelu_erf", "clamped_swiglu", "multiply", "add", "scale", "head_norm", "rope", "rope_cache",
        "position_scale", "cache_write", "attention", "block_choose", "mla_attention",
    }
)  # fmt: skip
# Ops that every process computes for all elements.
_WHOLE = frozenset(
    {
        "embedding", "rms_norm", "layer_norm", "add", "add_rms_norm", "scale", "scale_by", "hidden_out", "draft_out",
        "select_rows", "rope_table", "state_in", "concat", "rope", "latent", "latent_write", "index_write", "index_choose",
        "router", "hash_router", "sigmoid_gate",
    }
)  # fmt: skip
_TABLES = frozenset({"rope", "rope_cache"})  # ops whose last input is a whole table
_CACHED = frozenset({"rope_cache", "cache_write", "attention", "block_choose"})
_ATTENTION = _CACHED | {"mla_attention"}  # ops that read heads
_NORMS = frozenset({"rms_norm", "layer_norm"})
_INDEX = frozenset({"index_write", "index_choose"})
_READ_WHOLE = _INDEX | {"latent", "add_rms_norm", "sigmoid_gate"}


def split(graph: Graph, rank: int, parallel: Parallel, units_of: UnitsOf) -> Shard:
    """The share of process `rank`.

    Args:
        graph: the graph of the whole model.
        rank: 0 or more.
        parallel: among how many processes, at least 2, the layers are divided; without a pipeline.
        units_of: what matrices can be divided into.

    Raises:
        UnsupportedModelError: a part of the graph cannot be divided.
        ConfigError: the number of heads or of experts, or a width, cannot be divided by the number of processes.
    """
    return _Split(graph, rank, parallel, units_of).shard()


class _Split:
    def __init__(self, graph: Graph, rank: int, parallel: Parallel, units_of: UnitsOf) -> None:
        self.graph, self.rank, self.parallel, self.units_of = graph, rank, parallel, units_of
        self.ranks = parallel.ranks
        self.spans: dict[Value, Span] = {}  # of values that are divided
        self.own: dict[Value, Value] = {}  # their parts
        self.addends: dict[Value, Value] = {}  # of values that are sums over all processes, while they are not added
        self.parts: dict[str, Part] = {}
        self.views: dict[str, tuple[str, Span]] = {}
        self.uses = Counter(name for node in graph.nodes for name in node.weights)
        self.unit = math.lcm(*(unit for name in self._matrices() for unit in _both(units_of(name))))

    def shard(self) -> Shard:
        if isinstance(self.graph.cache, RowsSpec) or self.graph.states or self.graph.adapter_sites:
            raise self._refused("its cache holds something else than keys and values of heads, or their latents")
        cache = self._cache(self.graph.cache)
        nodes = [part for node in self.graph.nodes for part in self._added_first(node)]
        return Shard(replace(self.graph, nodes=nodes, cache=cache), self.parts, self.views)

    def _cache(self, cache: CacheSpec | LatentSpec) -> CacheSpec | LatentSpec:
        if isinstance(cache, LatentSpec):
            return cache
        heads = cache.kv_heads if isinstance(cache.kv_heads, tuple) else (cache.kv_heads,) * cache.layers
        own = tuple(self._divided(n, "key and value heads (num_key_value_heads)") for n in heads)
        return replace(cache, kv_heads=own if isinstance(cache.kv_heads, tuple) else own[0])

    def _matrices(self) -> Iterator[str]:
        products = ("linear", "gate_up", "lm_head")
        return (name for node in self.graph.nodes if node.op in products for name in node.weights)

    def _added_first(self, node: Node) -> list[Node]:
        """The node's part, after the sums over all processes that it reads and that no node before it does."""
        if node.op == "add" and all(value in self.addends for value in node.inputs):
            parts = tuple(self.addends.pop(value) for value in node.inputs)
            return [node.with_(inputs=parts, outputs=(self._addend(node.outputs[0]),))]
        sums = [
            Node("all_reduce", (self.addends.pop(value),), (value,), attrs={"ranks": self.ranks})
            for value in dict.fromkeys(node.inputs)
            if value in self.addends
        ]
        return [*sums, *self._node(node)]

    def _addend(self, value: Value) -> Value:
        """This process's part of a sum over all."""
        part = self.addends[value] = replace(value, name=f"{value.name}.part")
        return part

    def _node(self, node: Node) -> list[Node]:
        divided = [value in self.own for value in node.inputs]
        if node.op == "lm_head":
            return self._head(node)
        if node.op in ("linear", "gate_up"):
            if any(part is not None for part in rows_of(node)):
                raise self._refused(f"{node.weights[0]} holds several matrices in one")
            return self._by_columns(node) if divided[0] else [self._by_rows(node)]
        if node.op == "experts_gate_up":
            return [self._gated_experts(node)]
        if node.op == "experts_down":
            return [self._added_experts(node)]
        if not any(divided):
            if node.op not in _WHOLE and node.op not in _CACHED:
                raise self._refused(f"op {node.op} cannot be divided")
            if node.op in _WHOLE:
                return [node]
        expected = [True] * len(divided)
        if node.op in _TABLES or (node.op == "mla_attention" and len(divided) > 1):
            expected[-1] = False
        if node.op not in _DIVISIBLE or divided != expected:
            raise self._refused(f"op {node.op} needs all elements of {', '.join(v.name for v in node.inputs)}")
        return [self._alike(node)]

    def _by_rows(self, node: Node) -> Node:
        """A product of which this process has some rows."""
        biases: tuple[str | None, ...] = node.attrs["biases"]
        gated = node.op == "gate_up"
        for output in node.outputs:
            if gated or not self._is_whole(output):
                self._divide(output, self._span_of(output))
        outputs = node.outputs * (len(node.weights) if gated else 1)
        for name, bias, output in zip(node.weights, biases, outputs, strict=True):
            if output not in self.spans:
                continue
            self._check(self.spans[output], output, self.units_of(name).rows, name)
            self._take(name, Part(rows=self.spans[output]))
            if bias is not None:
                self._take(bias, Part(rows=self.spans[output]))
        return node.with_(outputs=tuple(self.own.get(output, output) for output in node.outputs))

    def _is_whole(self, value: Value) -> bool:
        """Whether every process needs all elements of a product's result: for a latent or its norm, the lightning indexer, or
        the sum of residuals."""
        readers = [node for node in self.graph.nodes if value in node.inputs]
        if any(node.op in _READ_WHOLE for node in readers):
            return True
        reached = self._reached(value, _DIVISIBLE | _NORMS | _INDEX)
        if any(node.op in _INDEX for node in reached):
            return True
        return any(node.op in _NORMS for node in readers) and not any(node.op in _ATTENTION for node in reached)

    def _reached(self, value: Value, through: frozenset[str]) -> list[Node]:
        """The nodes with one of these ops that depend on a value directly or through such nodes, the nearest first."""
        found: list[Node] = []
        reached, queue = {value}, [value]
        while queue:
            current = queue.pop()
            for node in self.graph.nodes:
                if current in node.inputs and node.op in through and node not in found:
                    found.append(node)
                    queue += [out for out in node.outputs if out not in reached]
                    reached.update(node.outputs)
        return found

    def _gated_experts(self, node: Node) -> Node:
        """The first product of the experts that this process has, or of some elements of these."""
        ((hidden,), (name,)), biases = (node.outputs, node.weights), node.attrs.get("biases", (None,))
        if self.parallel.tensor == 1:
            span = (0, hidden.width)
        else:
            if any(bias is not None for bias in biases):
                raise self._refused(
                    "its experts have biases, so they can be divided as whole ones only; use expert, not tensor"
                )
            units = self.units_of(name).rows, self.units_of(self._down_of(node)).cols
            spans = even_spans(hidden.width, self.parallel.tensor, math.lcm(*units))
            span = spans[self.rank % self.parallel.tensor]
            if any(begin == end for begin, end in spans):
                raise ConfigError(
                    f"parallel: {self.parallel} processes cannot divide {name} with {hidden.width} elements per expert into "
                    f"blocks of {math.lcm(*units)}; use expert instead of tensor, or fewer"
                )
        self._divide(hidden, span)
        experts = self._own_experts(node)
        rows = None if span == (0, hidden.width) else span
        self._take(name, Part(rows=rows, experts=experts))
        return self._with_experts(node, biases, experts, outputs=(self.own[hidden],))

    def _added_experts(self, node: Node) -> Node:
        """Their second product; the sum of all processes' results is the experts' result."""
        (hidden, routes), (name,), biases = node.inputs, node.weights, node.attrs.get("biases", (None,))
        experts, span = self._own_experts(node), self.spans[hidden]
        self._check(span, hidden, self.units_of(name).cols, name)
        self._take(name, Part(cols=None if span == (0, hidden.width) else span, experts=experts))
        inputs = self.own[hidden], routes
        return self._with_experts(node, biases, experts, inputs=inputs, outputs=(self._addend(node.outputs[0]),))

    def _down_of(self, node: Node) -> str:
        """The weight of the second product of experts, given the first."""
        return next(n.weights[0] for n in self.graph.nodes if n.op == "experts_down" and n.inputs[0] == node.outputs[0])

    def _own_experts(self, node: Node) -> Span:
        experts, groups = node.attrs["experts"], self.parallel.expert
        if experts < groups:
            raise ConfigError(f"parallel: {self.parallel} processes cannot divide {experts} experts; use fewer")
        return even_spans(experts, groups, 1)[self.rank // self.parallel.tensor]

    def _with_experts(self, node: Node, biases: tuple[str | None, ...], experts: Span, **changes: Any) -> Node:
        for bias in filter(None, biases):
            self._take(bias, Part(rows=experts))
        attrs = {**node.attrs, "experts": experts[1] - experts[0], "first": experts[0], "of": node.attrs["experts"]}
        return node.with_(attrs=attrs, **changes)

    def _by_columns(self, node: Node) -> list[Node]:
        """A product of which this process has some columns; its result is the sum of all processes' results."""
        (x,) = node.inputs
        nodes = []
        if node.op != "linear":
            raise self._refused(f"op {node.op} reads a divided value")
        for name, bias, output in zip(node.weights, node.attrs["biases"], node.outputs, strict=True):
            self._check(self.spans[x], x, self.units_of(name).cols, name)
            self._take(name, Part(cols=self.spans[x]))
            own_bias = bias if self.rank == 0 else None  # it is added once
            nodes.append(Node("linear", (self.own[x],), (self._addend(output),), (name,), {"biases": (own_bias,)}))
        return nodes

    def _head(self, node: Node) -> list[Node]:
        """The head for some tokens of the vocabulary, and all processes' logits."""
        (name,), (logits,), bias = node.weights, node.outputs, node.attrs["bias"]
        unit = self.units_of(name).rows
        each = unit * -(-logits.width // (unit * self.ranks))
        begin, end = each * self.rank, min(logits.width, each * (self.rank + 1))
        if each * (self.ranks - 1) >= logits.width:
            raise ConfigError(
                f"parallel: {self.parallel} processes cannot divide a vocabulary of {logits.width} tokens into blocks of "
                f"{unit}; use fewer"
            )
        part = replace(logits, name=f"{logits.name}.part", width=end - begin)
        own = name
        if self.uses[name] > 1:  # the embedding's, which each process has as a whole
            own = f"{name}[{begin}:{end}]"
            self.views[own] = (name, (begin, end))
        else:
            self._take(name, Part(rows=(begin, end)))
        if bias is not None:
            self._take(bias, Part(rows=(begin, end)))
        head = node.with_(outputs=(part,), weights=(own,))
        return [head, Node("all_gather", (part,), (logits,), attrs={"ranks": self.ranks, "each": each})]

    def _alike(self, node: Node) -> Node:
        """An op over the elements or heads that this process has."""
        attrs: dict[str, Any] = dict(node.attrs)
        for count in ("heads", "kv_heads"):
            if count in attrs:
                attrs[count] = self._divided(attrs[count], count)
        per_head = {"attention": 1, "mla_attention": attrs.get("nope", 0) + attrs.get("v_dim", 0)}  # a logit; rows of kv_b
        if node.op in per_head:
            rows = attrs["heads"] * per_head[node.op]
            for name in node.weights:
                begin, end = rows * self.rank, rows * (self.rank + 1)
                if node.op == "mla_attention":
                    self._check((begin, end), replace(node.outputs[0], width=rows * self.ranks), self.units_of(name).rows, name)
                self._take(name, Part(rows=(begin, end)))
        for output in node.outputs:
            source = self.spans[node.inputs[0]]
            whole = node.inputs[0].width
            begin, end = (place * output.width // whole for place in source)
            self._divide(output, (begin, end))
        inputs = tuple(self.own.get(value, value) for value in node.inputs)
        return node.with_(inputs=inputs, outputs=tuple(self.own[value] for value in node.outputs), attrs=attrs)

    def _divide(self, value: Value, span: Span) -> None:
        self.spans[value] = span
        self.own[value] = replace(value, width=span[1] - span[0])

    def _span_of(self, value: Value) -> Span:
        """The elements of a product's result that this process has: of whole groups of heads if attention reads them."""
        attention = self._attention_of(value)
        if attention is None:
            spans = even_spans(value.width, self.ranks, self.unit)
            if any(begin == end for begin, end in spans):
                raise ConfigError(
                    f"parallel: {self.parallel} processes cannot divide {value.name} with {value.width} elements into "
                    f"blocks of {self.unit}; use fewer"
                )
            return spans[self.rank]
        own = value.width // attention * self._divided(attention, "key and value heads (num_key_value_heads)")
        return own * self.rank, own * (self.rank + 1)

    def _check(self, span: Span, value: Value, unit: int, name: str) -> None:
        """Raises ConfigError if a matrix cannot be divided at the ends of a span."""
        if span[0] % unit or (span[1] % unit and span[1] != value.width):
            raise ConfigError(
                f"parallel: {self.parallel} would divide {name} at {span[0]} and {span[1]}, but its format has blocks of "
                f"{unit}; use fewer processes, or another precision"
            )

    def _attention_of(self, value: Value) -> int | None:
        """The number of kv heads of the attention that reads a value, directly or through ops over heads; None: none does."""
        node = next((node for node in self._reached(value, _DIVISIBLE) if node.op in _ATTENTION), None)
        return None if node is None else int(node.attrs["heads" if node.op == "mla_attention" else "kv_heads"])

    def _divided(self, count: int, what: str) -> int:
        if count % self.ranks:
            raise ConfigError(f"parallel: {self.parallel} does not divide the model's {count} {what}; use a divisor of {count}")
        return count // self.ranks

    def _take(self, name: str, part: Part) -> None:
        if self.parts.setdefault(name, part) != part:
            raise self._refused(f"{name} is used in two ways")

    def _refused(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"parallel: {self.parallel} cannot divide this {self.graph.family} model: {reason}. Supported are decoders "
            "with keys and values per head or latent attention, such as Llama, Qwen, Mistral and DeepSeek; load it without "
            "parallel"
        )


def _both(units: Any) -> tuple[int, int]:
    return units.rows, units.cols
