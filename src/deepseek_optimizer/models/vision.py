"""Vision towers as graph nodes: pre-norm layers with bidirectional attention, over the whole picture or within windows.

A graph begins with the embeddings of the patches (`state_in`), which Transformers computes, and ends with the last layer.
Weights are named by their path in the module whose layers these are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import UnsupportedModelError, shown
from ..graph.ir import Graph, Node, Value
from .blocks import add, emit, linear, rms_norm
from .decoder import MAX_POSITIONS
from .encoder import ACTIVATIONS, Encoder, attention, encoder_graph, layer_norm, read_encoder
from .fields import Fields, positive
from .rope import RopeSpec

GATED_ACTIVATIONS = {"silu": "swiglu"}


@dataclass(frozen=True)
class Tower:
    """The layers of a vision tower.

    Attributes:
        graph: of all layers. A sequence of a step is what its rows attend to.
        windowed: by layer, whether that is a window of the picture; otherwise it is the picture.
        ends: layers whose results are needed besides the last one's; none of them has windows.
    """

    graph: Graph
    windowed: tuple[bool, ...]
    ends: tuple[int, ...] = ()

    def stretches(self) -> list[tuple[int, int]]:
        """The layers [begin, end) that run one after the other: those with windows up to the next one without, and each of the
        others by itself."""
        begins = [i for i in range(1, len(self.windowed)) if not (self.windowed[i] and self.windowed[i - 1])]
        return list(zip([0, *begins], [*begins, len(self.windowed)], strict=True))


@dataclass(frozen=True, kw_only=True)
class TowerLayer:
    """Names of the modules in a layer.

    Attributes:
        path: of layer i, with {} for i.
        attention_norm, mlp_norm: norms before attention and MLP.
        q, k, v: projections of the attention; the same module thrice, if it has the rows of all.
        o: the projection of its result.
        gate, up, down: projections of the MLP. gate "": there is none.
        rms: whether norms are RMS norms.
        qkv_bias: whether q, k and v have biases; all other products have.
    """

    path: str
    attention_norm: str
    mlp_norm: str
    q: str
    k: str
    v: str
    o: str
    up: str
    down: str
    gate: str = ""
    rms: bool = False
    qkv_bias: bool = True


def read_tower(fields: Fields, family: str, *, gated: bool = False, **names: str | float) -> Encoder:
    """The sizes of a tower.

    Args:
        fields: the vision tower's config.
        family: its `model_type`.
        gated: whether the MLPs have a gate.
        names: as in `read_encoder`.

    Raises:
        UnsupportedModelError, ConfigError: a field has a value that is not supported, or not valid.
    """
    sizes = fields.with_(vocab_size=1, max_position_embeddings=MAX_POSITIONS)
    return read_encoder(sizes, family, activations=GATED_ACTIVATIONS if gated else ACTIVATIONS, **names)  # type: ignore[arg-type]


def axial_rope(fields: Fields, head_dim: int) -> RopeSpec:
    """The RoPE of Qwen's towers: the first half of the frequencies takes the height, the second the width."""
    if head_dim % 4:
        raise UnsupportedModelError(f"config.num_heads: heads of {head_dim} elements cannot be rotated by height and width")
    parameters = fields.get("rope_parameters") or {}
    if (kind := parameters.get("rope_type", "axial")) != "axial":
        raise UnsupportedModelError(f"config.rope_parameters['rope_type'] {shown(kind)} is not supported. Supported: 'axial'.")
    theta = positive("rope_parameters['rope_theta']", parameters.get("rope_theta", 10000.0))
    half = head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = (1.0 / np.power(np.float32(theta), exponents)).astype(np.float32)
    return RopeSpec(
        "default", head_dim, np.concatenate([frequencies, frequencies]), context=MAX_POSITIONS, room=MAX_POSITIONS,
        axes=(1,) * len(frequencies) + (2,) * len(frequencies),
    )  # fmt: skip


def tower_graph(e: Encoder, names: TowerLayer, rope: RopeSpec | None = None) -> Graph:
    """The graph of a tower whose layers are y = x + attention(norm(x)), then y + MLP(norm(y))."""
    table: Value | None = None

    def norm(nodes: list[Node], x: Value, name: str, path: str) -> Value:
        return rms_norm(nodes, x, name, path, e.eps) if names.rms else layer_norm(nodes, e, x, name, path)

    def layer(nodes: list[Node], x: Value, index: int) -> Value:
        nonlocal table
        if rope is not None and table is None:
            table = emit(nodes, "rope_table", (), "rope", rope.rot, rope=rope)
        name, path = f"l{index}", names.path.format(index)
        normed = norm(nodes, x, f"{name}.attn_in", f"{path}.{names.attention_norm}")
        q, k, v = (_projection(nodes, e, names, normed, f"{name}.{'qkv'[i]}", path, i) for i in range(3))
        if table is not None:
            q, k = (_rotated(nodes, e, value, table) for value in (q, k))
        attended = attention(nodes, e, (q, k, v), f"{name}.attn")
        x = add(nodes, x, linear(nodes, attended, f"{name}.o", e.hidden, f"{path}.{names.o}", True), f"{name}.attn_out")
        normed = norm(nodes, x, f"{name}.mlp_in", f"{path}.{names.mlp_norm}")
        up = linear(nodes, normed, f"{name}.up", e.inner, f"{path}.{names.up}", True)
        inputs: tuple[Value, ...] = (up,)
        if names.gate:
            inputs = (linear(nodes, normed, f"{name}.gate", e.inner, f"{path}.{names.gate}", True), up)
        inner = emit(nodes, e.activation, inputs, f"{name}.h", e.inner)
        return add(nodes, x, linear(nodes, inner, f"{name}.down", e.hidden, f"{path}.{names.down}", True), f"{name}.out")

    return encoder_graph(e, layer)


def _projection(nodes: list[Node], e: Encoder, names: TowerLayer, x: Value, name: str, path: str, part: int) -> Value:
    """q, k or v: of its own matrix, or the rows of one matrix of all three, q's first."""
    module = (names.q, names.k, names.v)[part]
    rows = (part * e.hidden, (part + 1) * e.hidden, 3 * e.hidden) if names.q == names.k else None
    return linear(nodes, x, name, e.hidden, f"{path}.{module}", names.qkv_bias, rows)


def _rotated(nodes: list[Node], e: Encoder, x: Value, table: Value) -> Value:
    shape = {"heads": e.heads, "head_dim": e.head_dim, "interleaved": False}
    return emit(nodes, "rope", (x, table), f"{x.name}_rope", x.width, **shape)
