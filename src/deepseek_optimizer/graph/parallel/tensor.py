"""Divides every layer of a dense decoder among processes (tensor parallelism, Shoeybi et al. 2019).

Products whose input is whole are divided by rows of their matrices, so that each process has some heads and some elements of
the MLP. Products that read those are divided by columns, and `all_reduce` adds their results. The head is divided by rows, that
is by tokens of the vocabulary, and `all_gather` joins the logits. Everything else is the same in all processes, bit for bit.

The rule takes a graph before or after the fusion rules; it divides the weights in the same way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...errors import ConfigError, UnsupportedModelError
from ..ir import CacheSpec, Graph, Node, Value
from ..ops.products import rows_of
from .shard import Part, Shard, Span, UnitsOf, even_spans

# Ops that compute each element, or each head, of their outputs from the same one of their inputs.
_DIVISIBLE = frozenset(
    {
        "swiglu", "geglu", "gelu", "gelu_erf", "clamped_swiglu", "multiply", "add", "scale", "head_norm", "rope", "rope_cache",
        "position_scale", "cache_write", "attention", "block_choose",
    }
)  # fmt: skip
# Ops that every process computes for all elements.
_WHOLE = frozenset(
    {
        "embedding", "rms_norm", "layer_norm", "add", "add_rms_norm", "scale", "scale_by", "hidden_out", "select_rows",
        "rope_table",
    }
)  # fmt: skip
_TABLES = frozenset({"rope", "rope_cache"})  # ops whose last input is a whole table
_CACHED = frozenset({"rope_cache", "cache_write", "attention", "block_choose"})


def split(graph: Graph, rank: int, ranks: int, units_of: UnitsOf) -> Shard:
    """The share of process `rank` of `ranks`.

    Args:
        graph: the graph of the whole model.
        rank: 0 or more.
        ranks: 2 or more.
        units_of: what matrices can be divided into.

    Raises:
        UnsupportedModelError: the graph is not that of a dense decoder, or a part of it cannot be divided.
        ConfigError: the number of heads, or a width, cannot be divided by `ranks`.
    """
    return _Split(graph, rank, ranks, units_of).shard()


class _Split:
    def __init__(self, graph: Graph, rank: int, ranks: int, units_of: UnitsOf) -> None:
        self.graph, self.rank, self.ranks, self.units_of = graph, rank, ranks, units_of
        self.spans: dict[Value, Span] = {}  # of values that are divided
        self.own: dict[Value, Value] = {}  # their parts
        self.parts: dict[str, Part] = {}
        self.views: dict[str, tuple[str, Span]] = {}
        self.uses = Counter(name for node in graph.nodes for name in node.weights)
        self.unit = math.lcm(*(unit for name in self._matrices() for unit in _both(units_of(name))))

    def shard(self) -> Shard:
        cache = self.graph.cache
        if not isinstance(cache, CacheSpec) or self.graph.states or self.graph.adapter_sites:
            raise self._refused("its cache holds something else than keys and values of heads")
        heads = cache.kv_heads if isinstance(cache.kv_heads, tuple) else (cache.kv_heads,) * cache.layers
        own = tuple(self._divided(n, "key and value heads (num_key_value_heads)") for n in heads)
        nodes = [part for node in self.graph.nodes for part in self._node(node)]
        kv_heads = own if isinstance(cache.kv_heads, tuple) else own[0]
        return Shard(replace(self.graph, nodes=nodes, cache=replace(cache, kv_heads=kv_heads)), self.parts, self.views)

    def _matrices(self) -> Iterator[str]:
        products = ("linear", "gate_up", "lm_head")
        return (name for node in self.graph.nodes if node.op in products for name in node.weights)

    def _node(self, node: Node) -> list[Node]:
        divided = [value in self.own for value in node.inputs]
        if node.op == "lm_head":
            return self._head(node)
        if node.op in ("linear", "gate_up"):
            if any(part is not None for part in rows_of(node)):
                raise self._refused(f"{node.weights[0]} holds several matrices in one")
            return self._by_columns(node) if divided[0] else [self._by_rows(node)]
        if not any(divided):
            if node.op not in _WHOLE and node.op not in _CACHED:
                raise self._refused(f"op {node.op} cannot be divided")
            if node.op in _WHOLE:
                return [node]
        expected = [True] * len(divided)
        if node.op in _TABLES:
            expected[-1] = False
        if node.op not in _DIVISIBLE or divided != expected:
            raise self._refused(f"op {node.op} needs all elements of {', '.join(v.name for v in node.inputs)}")
        return [self._alike(node)]

    def _by_rows(self, node: Node) -> Node:
        """A product of which this process has some rows."""
        biases: tuple[str | None, ...] = node.attrs["biases"]
        gated = node.op == "gate_up"
        for output in node.outputs:
            self._divide(output, self._span_of(output))
        outputs = node.outputs * (len(node.weights) if gated else 1)
        for name, bias, output in zip(node.weights, biases, outputs, strict=True):
            self._check(self.spans[output], output, self.units_of(name).rows, name)
            self._take(name, Part(rows=self.spans[output]))
            if bias is not None:
                self._take(bias, Part(rows=self.spans[output]))
        return node.with_(outputs=tuple(self.own[output] for output in node.outputs))

    def _by_columns(self, node: Node) -> list[Node]:
        """A product of which this process has some columns, and the sum of all processes' results."""
        (x,) = node.inputs
        nodes = []
        if node.op != "linear":
            raise self._refused(f"op {node.op} reads a divided value")
        for name, bias, output in zip(node.weights, node.attrs["biases"], node.outputs, strict=True):
            self._check(self.spans[x], x, self.units_of(name).cols, name)
            self._take(name, Part(cols=self.spans[x]))
            part = replace(output, name=f"{output.name}.part")
            own_bias = bias if self.rank == 0 else None  # it is added once
            nodes.append(Node("linear", (self.own[x],), (part,), (name,), {"biases": (own_bias,)}))
            nodes.append(Node("all_reduce", (part,), (output,), attrs={"ranks": self.ranks}))
        return nodes

    def _head(self, node: Node) -> list[Node]:
        """The head for some tokens of the vocabulary, and all processes' logits."""
        (name,), (logits,), bias = node.weights, node.outputs, node.attrs["bias"]
        unit = self.units_of(name).rows
        each = unit * -(-logits.width // (unit * self.ranks))
        begin, end = each * self.rank, min(logits.width, each * (self.rank + 1))
        if each * (self.ranks - 1) >= logits.width:
            raise ConfigError(
                f"parallel: tensor={self.ranks} processes cannot divide a vocabulary of {logits.width} tokens into blocks of "
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
        if node.op == "attention":
            for name in node.weights:  # a logit per head
                heads = attrs["heads"]
                self._take(name, Part(rows=(heads * self.rank, heads * (self.rank + 1))))
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
                    f"parallel: tensor={self.ranks} processes cannot divide {value.name} with {value.width} elements into "
                    f"blocks of {self.unit}; use fewer"
                )
            return spans[self.rank]
        own = value.width // attention * self._divided(attention, "key and value heads (num_key_value_heads)")
        return own * self.rank, own * (self.rank + 1)

    def _check(self, span: Span, value: Value, unit: int, name: str) -> None:
        """Raises ConfigError if a matrix cannot be divided at the ends of a span."""
        if span[0] % unit or (span[1] % unit and span[1] != value.width):
            raise ConfigError(
                f"parallel: tensor={self.ranks} would divide {name} at {span[0]} and {span[1]}, but its format has blocks of "
                f"{unit}; use fewer processes, or another precision"
            )

    def _attention_of(self, value: Value) -> int | None:
        """The number of kv heads of the attention that reads a value, directly or through ops over heads; None: none does."""
        reached, queue = {value}, [value]
        while queue:
            current = queue.pop()
            for node in self.graph.nodes:
                if current not in node.inputs or node.op not in _DIVISIBLE:
                    continue
                if node.op in _CACHED:
                    return int(node.attrs["kv_heads"])
                queue += [out for out in node.outputs if out not in reached]
                reached.update(node.outputs)
        return None

    def _divided(self, count: int, what: str) -> int:
        if count % self.ranks:
            raise ConfigError(
                f"parallel: tensor={self.ranks} does not divide the model's {count} {what}; use a divisor of {count}"
            )
        return count // self.ranks

    def _take(self, name: str, part: Part) -> None:
        if self.parts.setdefault(name, part) != part:
            raise self._refused(f"{name} is used in two ways")

    def _refused(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"parallel: tensor={self.ranks} cannot divide this {self.graph.family} model: {reason}. Supported are decoders "
            "with keys and values per head and dense MLPs, such as Llama, Qwen and Mistral; load it without parallel"
        )


def _both(units: Any) -> tuple[int, int]:
    return units.rows, units.cols
