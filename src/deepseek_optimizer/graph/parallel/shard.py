"""What one of several processes has of a model: a graph of its own, and parts of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..ir import Graph

Span = tuple[int, int]  # [begin, end)


@dataclass(frozen=True)
class Part:
    """What a process has of a weight; None: all of them.

    Attributes:
        rows, cols: of a matrix, or of each matrix of a stack; `rows` are the elements of a vector.
        experts: of a stack of matrices of experts.
    """

    rows: Span | None = None
    cols: Span | None = None
    experts: Span | None = None


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
