"""What one of several processes has of a model: a graph of its own, and parts of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..ir import Graph

Span = tuple[int, int]  # [begin, end)


@dataclass(frozen=True)
class Part:
    """The rows and columns that a process has of a matrix, or the elements (`rows`) of a vector; None: all of them."""

    rows: Span | None = None
    cols: Span | None = None

    def shape_in(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this part of a weight of shape `whole`."""
        spans = (self.rows, self.cols)
        return tuple(n if span is None else span[1] - span[0] for n, span in zip(whole, spans, strict=False))


@dataclass(frozen=True)
class Shard:
    """A process's share of a graph.

    Attributes:
        graph: its graph. Weights have the names of the whole model.
        parts: by name, the parts of weights that the process does not have as a whole.
        views: by name in `graph`, the weight and the rows of it that a node uses, although the process has all of it: of a head
            that shares the embedding's matrix.
    """

    graph: Graph
    parts: Mapping[str, Part]
    views: Mapping[str, tuple[str, Span]]


@dataclass(frozen=True)
class Units:
    """Numbers of rows and columns that a matrix can be divided into: of its format's blocks."""

    rows: int
    cols: int


UnitsOf = Callable[[str], Units]  # of a matrix, by name


def even_spans(size: int, count: int, unit: int) -> list[Span]:
    """Divides `size` into `count` consecutive spans of nearly the same number of units; the last unit may be incomplete."""
    units = -(-size // unit)
    ends = [min(size, unit * (units * (i + 1) // count)) for i in range(count)]
    return list(zip([0, *ends], ends, strict=False))
