"""Hyper-connections as graph nodes: a residual of several streams around each block. See `graph/ops/streams.py`."""

from __future__ import annotations

from dataclasses import dataclass

from ..graph.ir import Node, Value
from .blocks import emit


@dataclass(frozen=True)
class Streams:
    """The residual streams of a model.

    Attributes:
        count: number of streams.
        steps: normalizations of the columns of a mixing matrix.
        eps: epsilon of these normalizations.
        norm_eps: epsilon of the norm of all streams.
    """

    count: int
    steps: int
    eps: float
    norm_eps: float


def spread(nodes: list[Node], s: Streams, x: Value) -> Value:
    """Streams that are all equal to x."""
    streams = x
    for i in range(1, s.count):
        streams = emit(nodes, "concat", (streams, x), f"streams{i}", streams.width + x.width)
    return streams


def stream_weights(nodes: list[Node], s: Streams, streams: Value, name: str, parameters: tuple[str, str, str]) -> Value:
    """The weights of a hyper-connection.

    Args:
        parameters: names of its matrix, biases and scales.
    """
    matrix, bias, scale = parameters
    last = matrix.endswith("hc_fn")  # the head's: it only collapses the streams
    width = s.count if last else (2 + s.count) * s.count
    normed = emit(
        nodes, "head_norm", (streams,), f"{name}.normed", streams.width, eps=s.norm_eps, heads=1, head_dim=streams.width
    )
    mix = emit(nodes, "linear", (normed,), f"{name}.mix", width, matrix, biases=(None,))
    weights = Value(f"{name}.weights", width)
    nodes.append(
        Node("stream_weights", (mix,), (weights,), (bias, scale), {"streams": s.count, "steps": s.steps, "eps": s.eps})
    )
    return weights


def collapse(nodes: list[Node], s: Streams, streams: Value, weights: Value, name: str) -> Value:
    """The input of a block."""
    return emit(nodes, "stream_collapse", (streams, weights), name, streams.width // s.count, streams=s.count)


def expand(nodes: list[Node], s: Streams, streams: Value, weights: Value, y: Value, name: str) -> Value:
    """The streams after a block with output y."""
    return emit(nodes, "stream_expand", (streams, weights, y), name, streams.width, streams=s.count)
