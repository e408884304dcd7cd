"""The rotation of a model's cached keys by RoPE, read from its graph. It is needed to move cached keys to other positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedModelError, UnsupportedRequestError
from .ir import Graph, Node, RowsSpec, Value


@dataclass(frozen=True)
class Pairs:
    """The rotated elements of a key: `rot` of them from `offset` on, in pairs (2i, 2i + 1) if `interleaved`, else
    (i, i + rot/2)."""

    rot: int
    offset: int
    interleaved: bool


@dataclass(frozen=True, eq=False)
class KeyRotation:
    """The rotation that all layers of a model share. A scaling factor of RoPE (yarn) is already part of the cached keys.

    Attributes:
        inv_freq: float32 [rot/2].
        key: rotated elements of a head's key, or of the rotated key stored with a latent.
        index: rotated elements of the lightning indexer's key; None without an indexer.
        context: positions below this one have these frequencies in any sequence; None: all positions.
    """

    inv_freq: npt.NDArray[np.float32]
    key: Pairs
    index: Pairs | None = None
    context: int | None = None

    def check(self, end: int) -> None:
        """Raises UnsupportedRequestError if keys at positions below `end` may have been rotated by other frequencies."""
        if self.context is not None and end > self.context:
            raise UnsupportedRequestError(
                f"keys cannot be moved: with this model's dynamic RoPE, frequencies change above {self.context} tokens, and "
                f"there are {end}; set a window of at most {self.context} tokens"
            )


def key_rotation(graph: Graph) -> KeyRotation:
    """The rotation that RoPE applies to all cached keys of a graph.

    Raises:
        UnsupportedModelError: a layer has no RoPE, layers have different ones, a layer has a recurrent state, or attention is
            compressed.
    """
    if graph.states:
        raise UnsupportedModelError(
            "cache_window requires attention in all layers, but recurrent layers of this model cannot drop tokens; use it "
            "without cache_window"
        )
    if isinstance(graph.cache, RowsSpec):
        raise UnsupportedModelError(
            "cache_window is not supported with compressed attention, whose entries cannot be moved; use the model without it"
        )
    producers = {value: node for node in graph.nodes for value in node.outputs}
    rotations = {kind: set(_rotations(graph, producers, kind)) for kind in ("key", "index")}
    if len(rotations["key"]) != 1 or len(rotations["index"]) > 1:
        raise UnsupportedModelError(
            "cache_window requires the same RoPE in all layers, but this model's layers differ; use the model without it"
        )
    (table, key), index = rotations["key"].pop(), next(iter(rotations["index"]), None)
    if index is not None and index[0] != table:
        raise UnsupportedModelError(
            "cache_window requires the indexer to use the model's RoPE, but it does not; use the model without it"
        )
    rope = producers[table].attrs["rope"]
    context = rope.context if rope.is_dynamic else None
    return KeyRotation(rope.inv_freq, key, None if index is None else index[1], context)


def _rotations(graph: Graph, producers: dict[Value, Node], kind: str) -> Iterator[tuple[Value, Pairs]]:
    """Yields for each node that writes keys to the cache the table that rotated them, and the rotated elements."""
    for node in graph.nodes:
        if kind == "key" and node.op == "rope_cache":
            yield node.inputs[3], Pairs(node.inputs[3].width, 0, node.attrs["interleaved"])
        elif kind == "key" and node.op == "latent_write":
            latent = producers[node.inputs[0]]
            yield latent.inputs[1], Pairs(latent.inputs[1].width, 0, latent.attrs["interleaved"])
        elif node.op == ("cache_write" if kind == "key" else "index_write"):
            rope = producers[node.inputs[0]]
            if rope.op != "rope":
                raise UnsupportedModelError(f"layer {node.attrs['layer']}: its cached keys have no RoPE")
            yield rope.inputs[1], Pairs(rope.inputs[1].width, rope.attrs.get("offset", 0), rope.attrs["interleaved"])
