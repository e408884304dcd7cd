"""How a model's cached keys were turned by RoPE, read off its graph: what whoever moves them to other positions must know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedModelError, UnsupportedRequestError
from .ir import Graph, Node, Value


@dataclass(frozen=True)
class Pairs:
    """Where the numbers that turn lie in a key: `rot` of them from `offset` on, in pairs (2i, 2i + 1) where `interleaved`,
    (i, i + rot/2) where not."""

    rot: int
    offset: int
    interleaved: bool


@dataclass(frozen=True, eq=False)
class KeyRotation:
    """All layers of a model turn alike. A scale of RoPE (yarn's) is in the cached keys already and has no part in this.

    Attributes:
        inv_freq: float32 [rot/2].
        key: of a head's key, or of the turned key beside a latent.
        index: of the lightning indexer's key; None where there is none.
        context: positions below this one have these frequencies whatever else is in the sequence; None: all have.
    """

    inv_freq: npt.NDArray[np.float32]
    key: Pairs
    index: Pairs | None = None
    context: int | None = None

    def check(self, end: int) -> None:
        """Raises UnsupportedRequestError for keys at positions below `end` that other frequencies may have turned."""
        if self.context is not None and end > self.context:
            raise UnsupportedRequestError(
                f"keys cannot be moved: this model's RoPE is dynamic, its frequencies change with lengths above {self.context} "
                f"tokens, and there are {end}. Choose a window of at most {self.context} tokens"
            )


def key_rotation(graph: Graph) -> KeyRotation:
    """The one way in which all cached keys of a graph were turned.

    Raises: UnsupportedModelError where there is none: a layer's keys do not turn, or layers differ.
    """
    makers = {value: node for node in graph.nodes for value in node.outputs}
    found = {kind: set(_turns(graph, makers, kind)) for kind in ("key", "index")}
    if len(found["key"]) != 1 or len(found["index"]) > 1:
        raise UnsupportedModelError(
            "a window of the cache needs keys of all layers to be turned by RoPE alike, and they are not"
        )
    (table, key), index = found["key"].pop(), next(iter(found["index"]), None)
    if index is not None and index[0] != table:
        raise UnsupportedModelError("a window of the cache needs the indexer's keys to be turned by RoPE as the others are")
    rope = makers[table].attrs["rope"]
    context = rope.context if rope.is_dynamic else None
    return KeyRotation(rope.inv_freq, key, None if index is None else index[1], context)


def _turns(graph: Graph, makers: dict[Value, Node], kind: str) -> Iterator[tuple[Value, Pairs]]:
    """Of each node that writes keys to the cache: the table they were turned by, and how."""
    for node in graph.nodes:
        if kind == "key" and node.op == "rope_cache":
            yield node.inputs[3], Pairs(node.inputs[3].width, 0, node.attrs["interleaved"])
        elif kind == "key" and node.op == "latent_write":
            made = makers[node.inputs[0]]
            yield made.inputs[1], Pairs(made.inputs[1].width, 0, made.attrs["interleaved"])
        elif node.op == ("cache_write" if kind == "key" else "index_write"):
            made = makers[node.inputs[0]]
            if made.op != "rope":
                raise UnsupportedModelError(f"layer {node.attrs['layer']}: its cached keys are not turned by RoPE")
            yield made.inputs[1], Pairs(made.inputs[1].width, made.attrs.get("offset", 0), made.attrs["interleaved"])
