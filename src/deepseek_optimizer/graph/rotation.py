"""How RoPE rotated a model's cached keys, read from its graph. Needed to move cached keys to other positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedModelError, UnsupportedRequestError
from .ir import Graph, Node, Value


@dataclass(frozen=True)
class Pairs:
    """The rotated elements of a key: `rot` of them from `offset` on, in pairs (2i, 2i + 1) if `interleaved`, else
    (i, i + rot/2)."""

    rot: int
    offset: int
    interleaved: bool


@dataclass(frozen=True, eq=False)
class KeyRotation:
    """The rotation that all layers of a model share. A scaling factor of RoPE (yarn) is part of the cached keys already.

    Attributes:
        inv_freq: float32 [rot/2].
        key: of a head's key, or of the rotated key beside a latent.
        index: of the lightning indexer's key; None without an indexer.
        context: positions below this one have these frequencies in any sequence; None: all positions have.
    """

    inv_freq: npt.NDArray[np.float32]
    key: Pairs
    index: Pairs | None = None
    context: int | None = None

    def check(self, end: int) -> None:
        """Raises UnsupportedRequestError if keys at positions below `end` may have been rotated by other frequencies."""
        if self.context is not None and end > self.context:
            raise UnsupportedRequestError(
                f"keys cannot be moved: this model's RoPE is dynamic, its frequencies change with lengths above {self.context} "
                f"tokens, and there are {end}. Choose a window of at most {self.context} tokens"
            )


def key_rotation(graph: Graph) -> KeyRotation:
    """The one rotation that RoPE applied to all cached keys of a graph.

    Raises: UnsupportedModelError if there is none: a layer has no RoPE, or layers differ.
    """
    makers = {value: node for node in graph.nodes for value in node.outputs}
    found = {kind: set(_rotations(graph, makers, kind)) for kind in ("key", "index")}
    if len(found["key"]) != 1 or len(found["index"]) > 1:
        raise UnsupportedModelError(
            "a cache window needs the same RoPE in all layers, and this model's layers differ; use it without a window"
        )
    (table, key), index = found["key"].pop(), next(iter(found["index"]), None)
    if index is not None and index[0] != table:
        raise UnsupportedModelError(
            "a cache window needs the indexer to use the model's RoPE, and it does not; use it without a window"
        )
    rope = makers[table].attrs["rope"]
    context = rope.context if rope.is_dynamic else None
    return KeyRotation(rope.inv_freq, key, None if index is None else index[1], context)


def _rotations(graph: Graph, makers: dict[Value, Node], kind: str) -> Iterator[tuple[Value, Pairs]]:
    """For each node that writes keys to the cache: the table that rotated them, and the rotated elements."""
    for node in graph.nodes:
        if kind == "key" and node.op == "rope_cache":
            yield node.inputs[3], Pairs(node.inputs[3].width, 0, node.attrs["interleaved"])
        elif kind == "key" and node.op == "latent_write":
            made = makers[node.inputs[0]]
            yield made.inputs[1], Pairs(made.inputs[1].width, 0, made.attrs["interleaved"])
        elif node.op == ("cache_write" if kind == "key" else "index_write"):
            made = makers[node.inputs[0]]
            if made.op != "rope":
                raise UnsupportedModelError(f"layer {node.attrs['layer']}: its cached keys have no RoPE")
            yield made.inputs[1], Pairs(made.inputs[1].width, made.attrs.get("offset", 0), made.attrs["interleaved"])
