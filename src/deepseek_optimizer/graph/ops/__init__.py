"""The table of ops: one `OpSpec` per op, by name.

To add an op, write its entry in the file of its subject and its function in each backend; CONTRIBUTING.md, "Op", shows how.
`python -m deepseek_optimizer.graph.ops` prints the table as Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ...errors import GraphError
from ..ir import Node
from . import adapters, attention, compressed, elementwise, encoder, experts, grids, latent, products, recurrent, streams
from .spec import OpSpec

__all__ = ["OPS", "OpSpec", "spec_of"]

_ALL = (
    *products.SPECS, *elementwise.SPECS, *attention.SPECS, *latent.SPECS, *experts.SPECS, *recurrent.SPECS, *encoder.SPECS,
    *adapters.SPECS, *compressed.SPECS, *streams.SPECS, *grids.SPECS,
)  # fmt: skip
OPS: Mapping[str, OpSpec] = MappingProxyType({spec.name: spec for spec in _ALL})


def spec_of(node: Node) -> OpSpec:
    """The spec of a node's op; GraphError if the table does not have the op."""
    spec = OPS.get(node.op)
    if spec is None:
        raise GraphError(f"no such op: {node.op!r}; known: {', '.join(OPS)}")
    return spec
