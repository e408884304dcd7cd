"""Groups of matrices that must have the same format, since one fused kernel reads them.

They are derived from the graph with all rules applied: the weights of one node (q, k and v; gate and up; the experts of a
layer) form a group, and nodes that share a matrix (a tied embedding and head) are merged. New families and rules need no
change here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..graph.ir import Graph


@dataclass(frozen=True)
class Group:
    """A group of matrices.

    Attributes:
        matrices: parameter names, in order of use.
        start: index of the last hidden state that does not depend on them; None: all depend on them.
    """

    matrices: tuple[str, ...]
    start: int | None


def format_groups(graph: Graph, matrices: Collection[str]) -> list[Group]:
    """Returns the groups of a graph in order of use.

    Args:
        graph: a graph with all rules applied.
        matrices: names of the weights that have a format; others (norms, biases) are ignored.
    """
    members: dict[str, set[str]] = {}  # name -> its group; the members of a group share one set
    starts: dict[str, int | None] = {}  # in order of use
    at: int | None = None
    for node in graph.nodes:
        if node.op == "hidden_out":
            at = node.attrs["index"]
        names = [name for name in node.weights if name in matrices]
        together = set(names).union(*(members.get(name, ()) for name in names))
        members.update(dict.fromkeys(together, together))
        for name in names:
            starts.setdefault(name, at)
    groups = {id(group): group for name in starts for group in (members[name],)}
    ordered = [tuple(name for name in starts if name in group) for group in groups.values()]
    return [Group(names, starts[names[0]]) for names in ordered]
