"""Divides the layers of a decoder among processes (pipeline parallelism, Huang et al. 2019).

Process 0 has the embedding, the first layers, and what follows the last layer: the last norm, the head, and MTP layers. Each of
the others has consecutive layers. A process receives the hidden rows of a step from the one before it (`state_in`), and sends
those after its layers (`hidden_out`) to the next one, or to process 0 after the last layer.

Between two layers only the hidden rows may be in use, besides values that each process computes for itself: tables of RoPE, and
the norm of the hidden rows, which the fusion rules compute together with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import ConfigError, UnsupportedModelError
from ..ir import NO_CACHE, CacheSpec, Graph, LatentSpec, Node, RowsSpec, Value
from ..ops import spec_of
from .layer_shares import Machine, layer_ends


@dataclass(frozen=True)
class Stage:
    """The share of a process.

    Attributes:
        graph: its layers; of process 0 with the embedding. The result is its only hidden state: the rows after its layers.
        tail: of process 0, what follows the last layer; None in the others.
        cached: the layers of the whole cache that its cache holds, in order.
        groups: the groups of the whole cache that these are in, in order.
        end: the number of layers that it and the processes before it have.
    """

    graph: Graph
    tail: Graph | None
    cached: tuple[int, ...]
    groups: tuple[int, ...]
    end: int

    def weights(self) -> list[str]:
        """Every weight's name, once."""
        graphs = (self.graph,) if self.tail is None else (self.graph, self.tail)
        return list(dict.fromkeys(name for graph in graphs for name in graph.weights()))


def split_layers(
    graph: Graph, ranks: int, size_of: Callable[[str], int], machines: Sequence[Machine] | None = None
) -> list[Stage]:
    """The shares of all processes, see `layer_ends`.

    Args:
        graph: of the whole model, with a head.
        ranks: number of processes, 2 or more.
        size_of: bytes of a weight, by name.
        machines: what each process has; None: they have the same.

    Raises:
        ConfigError: the model has fewer layers than there are processes.
        UnsupportedModelError: more than hidden rows is in use between two layers, or the model has recurrent states.
    """
    pipeline = _Pipeline(graph, ranks)
    return pipeline.stages(layer_ends(pipeline.sizes(size_of), machines or [Machine(1, 1.0)] * ranks))


def divided_as(graph: Graph, stages: Sequence[Stage]) -> list[Stage]:
    """The shares of a graph whose layers are divided like those of another one.

    Args:
        graph: of the same layers; its weights may have other names.
        stages: of the other graph.
    """
    return _Pipeline(graph, len(stages)).stages([stage.end for stage in stages])


def on_first(graph: Graph, stage: Stage) -> Graph:
    """A graph that process 0 runs alone, with the layers of its cache: of an MTP layer.

    Args:
        graph: with the cache of the whole model.
        stage: of process 0.
    """
    number = {layer: n for n, layer in enumerate(stage.cached)}
    return replace(graph, nodes=[_renumbered(node, number) for node in graph.nodes], cache=stage.graph.cache)


class _Pipeline:
    def __init__(self, graph: Graph, ranks: int) -> None:
        self.graph, self.ranks = graph, ranks
        if graph.states or graph.adapter_sites or graph.written or isinstance(graph.cache, RowsSpec):
            raise self._refused("its cache holds something else than keys and values of heads, or their latents")
        if any(node.op in ("state_in", "draft_out", "add_features") for node in graph.nodes):
            raise self._refused("its layers take or give other rows than hidden states")

    def sizes(self, size_of: Callable[[str], int]) -> list[int]:
        """Bytes of the weights of each layer; of the first one with those before and after all layers."""
        nodes, ends = self.graph.nodes, self._layer_ends()
        if len(ends) < self.ranks:
            raise ConfigError(f"parallel: pipeline={self.ranks} processes cannot divide {len(ends)} layers; use fewer")
        begins = [0, *ends]
        sizes = [sum(size_of(name) for name in _weights(nodes[begin:end])) for begin, end in zip(begins, ends, strict=False)]
        sizes[0] += sum(size_of(name) for name in _weights(nodes[ends[-1] :]) if name not in _weights(nodes[: ends[0]]))
        return sizes

    def stages(self, lasts: Sequence[int]) -> list[Stage]:
        """The shares of processes whose layers end with these."""
        nodes, ends = self.graph.nodes, self._layer_ends()
        cuts = [ends[last - 1] for last in lasts]
        parts = [self._part(begin, end) for begin, end in zip([0, *cuts], cuts, strict=False)]
        tail = self._part(cuts[-1], len(nodes))
        cached = [sorted({layer for node in part for layer in _layers_of(node)}) for part in parts]
        self._check_reads(cached)
        further = set(range(self.graph.cache.layers)) - {layer for layers in cached for layer in layers}
        cached[0] += sorted(further)  # of MTP layers
        tails = [tail, *[None] * (self.ranks - 1)]
        made = [self._stage(*of_rank) for of_rank in zip(parts, cached, tails, lasts, strict=True)]
        if any(stage.graph.looks_up for stage in made[1:]):
            raise self._refused("later layers read token ids, which only the first process has")
        return made

    def _layer_ends(self) -> list[int]:
        """The number of nodes up to the end of each layer: where the hidden state is complete."""
        nodes = self.graph.nodes
        states = {n.inputs[0] for n in nodes if n.op == "hidden_out" and 0 < n.attrs["index"] < self.graph.hidden_states - 1}
        ends = [i + 1 for i, node in enumerate(nodes) if states.intersection(node.outputs)]
        last = max((i for i, node in enumerate(nodes) if _layers_of(node)), default=-1)
        sums = [i for i, node in enumerate(nodes) if i > last and node.op in ("add", "add_rms_norm", "scale_by")]
        if not sums:
            raise self._refused("its last layer does not end with the sum of residuals")
        return [*ends, sums[-1] + 1]

    def _part(self, begin: int, end: int) -> list[Node]:
        """The nodes [begin, end), with those that receive and send hidden rows."""
        nodes = [node for node in self.graph.nodes[begin:end] if node.op != "hidden_out" or self._is_last(node)]
        before = self._received(begin) if begin else []
        if end == len(self.graph.nodes):
            return [*before, *nodes]
        rows = self._rows_at(end)
        return [*before, *nodes, Node("hidden_out", (rows,), attrs={"index": 0})]

    def _is_last(self, node: Node) -> bool:
        return bool(node.attrs["index"] == self.graph.hidden_states - 1)

    def _crossing(self, at: int) -> list[Value]:
        """The values that nodes before `at` compute and nodes from there on read."""
        made = {value for node in self.graph.nodes[:at] for value in node.outputs}
        read = dict.fromkeys(value for node in self.graph.nodes[at:] for value in node.inputs)
        return [value for value in read if value in made]

    def _rows_at(self, at: int) -> Value:
        """The hidden rows between two layers."""
        return self.graph.nodes[at - 1].outputs[0]

    def _received(self, at: int) -> list[Node]:
        """Nodes that receive the hidden rows, and compute what else is in use there."""
        rows, last = self._rows_at(at), self.graph.nodes[at - 1]
        received = [Node("state_in", (), (rows,))]
        for value in self._crossing(at):
            producer = self.graph.producer(value)
            assert producer is not None
            if value == rows:
                continue
            if producer is last and last.op == "add_rms_norm":
                attrs: dict[str, Any] = {name: last.attrs[name] for name in ("eps", "unit_offset") if name in last.attrs}
                received.append(Node("rms_norm", (rows,), (value,), last.weights, attrs))
            elif not producer.inputs and not producer.weights:
                received.insert(0, producer)
            else:
                raise self._refused(f"{value.name} is in use in several layers")
        return received

    def _check_reads(self, cached: Sequence[Sequence[int]]) -> None:
        seen: set[int] = set()
        for layers in cached:
            if seen.intersection(layers):
                raise self._refused(f"layer {min(seen.intersection(layers))} of its cache is read in several layers")
            seen.update(layers)

    def _stage(self, nodes: list[Node], layers: list[int], tail: list[Node] | None, end: int) -> Stage:
        cache = self.graph.cache
        groups = tuple(sorted({group for layer in layers for group in _groups_of(cache, layer)}))
        number = {layer: n for n, layer in enumerate(layers)}
        own = replace(
            self.graph, nodes=[_renumbered(node, number) for node in nodes], hidden_states=1,
            cache=_part_of(cache, layers, groups),
        )  # fmt: skip
        if tail is None:
            return Stage(own, None, tuple(layers), groups, end)
        last = [node.with_(attrs={"index": 0}) if node.op == "hidden_out" else node for node in tail]
        return Stage(own, replace(self.graph, nodes=last, hidden_states=1, cache=NO_CACHE), tuple(layers), groups, end)

    def _refused(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"parallel: pipeline={self.ranks} cannot divide this {self.graph.family} model: {reason}; load it without parallel"
        )


def _weights(nodes: Sequence[Node]) -> list[str]:
    return Graph("", list(nodes), 0, 0, 0, NO_CACHE, 0).weights()


def _layers_of(node: Node) -> list[int]:
    """The layers of the cache that a node reads or writes."""
    spec = spec_of(node)
    return [node.attrs["layer"]] if spec.reads or spec.writes else []


def _renumbered(node: Node, number: dict[int, int]) -> Node:
    if not _layers_of(node):
        return node
    return node.with_(attrs={**node.attrs, "layer": number[node.attrs["layer"]]})


def _groups_of(cache: CacheSpec | LatentSpec | RowsSpec, layer: int) -> list[int]:
    return [cache.group_of(layer), *([cache.newest_groups[layer]] if cache.newest else [])]


def _part_of(cache: CacheSpec | LatentSpec | RowsSpec, layers: list[int], groups: tuple[int, ...]) -> CacheSpec | LatentSpec:
    """The cache with these layers, whose groups are numbered in order."""
    if isinstance(cache, LatentSpec):
        return replace(cache, layers=len(layers))
    assert isinstance(cache, CacheSpec)
    number = {group: n for n, group in enumerate(groups)}

    def of_layers(values: int | tuple[int, ...]) -> int | tuple[int, ...]:
        return tuple(values[layer] for layer in layers) if isinstance(values, tuple) else values

    return replace(
        cache, layers=len(layers), kv_heads=of_layers(cache.kv_heads), head_dim=of_layers(cache.head_dim),
        layer_groups=tuple(number[cache.layer_groups[layer]] for layer in layers) if cache.layer_groups else (),
        newest_groups=tuple(number[cache.newest_groups[layer]] for layer in layers) if cache.newest else (),
    )  # fmt: skip
