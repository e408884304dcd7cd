"""Vision towers as graph nodes: pre-norm layers with bidirectional attention, over the whole picture or within windows.

A graph begins with the embeddings of the patches (`state_in`), which Transformers computes, and ends with the last layer.
Weights are named by their path in the module whose layers these are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import UnsupportedModelError, shown
from ..graph.ir import Graph, Node, Value
from .blocks import add, emit, linear, rms_norm
from .decoder import MAX_POSITIONS
from .encoder import ACTIVATIONS, MAX_HEAD_DIM, Encoder, attention, encoder_graph, layer_norm, read_encoder
from .fields import Fields, positive
from .rope import Frequencies, RopeSpec

GATED_ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}


@dataclass(frozen=True)
class Tower:
    """The layers of a vision tower.

    Attributes:
        graph: of all layers. A sequence of a step is what its rows attend to.
        windowed: by layer, whether that is a window of the picture; otherwise it is the picture.
        ends: layers whose results are needed besides the last one's; none of them has windows.
        on_grid: the graph for pictures of so many rows and columns of patches, if it depends on them (`graph` is for those that
            the tower was trained on); raises UnsupportedModelError if there are too many. None: it does not.
    """

    graph: Graph
    windowed: tuple[bool, ...]
    ends: tuple[int, ...] = ()
    on_grid: Callable[[int, int], Graph] | None = None

    def stretches(self) -> list[tuple[int, int]]:
        """The layers [begin, end) that run one after the other: those with windows up to the next one without, and each of the
        others by itself."""
        begins = [i for i in range(1, len(self.windowed)) if not (self.windowed[i] and self.windowed[i - 1])]
        return list(zip([0, *begins], [*begins, len(self.windowed)], strict=True))


@dataclass(frozen=True)
class RelativePositions:
    """Relative positions in height and width of the patches that attend to each other, in a grid.

    Attributes:
        by_row, by_col: names of the parameters in a layer.
        grids: by layer, rows and columns of the grid.
        padded: by layer, whether some of its rows are padding, whose keys and values are those of zeros.
    """

    by_row: str
    by_col: str
    grids: tuple[tuple[int, int], ...]
    padded: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class TowerLayer:
    """Names of the modules in a layer.

    Attributes:
        path: of layer i, with {} for i.
        attention_norm, mlp_norm: norms before attention and MLP.
        attention_out, mlp_out: norms of what attention and MLP add to the residual; "": there are none.
        q, k, v: projections of the attention; the same module thrice, if it has the rows of all.
        q_norm, k_norm: norms of each query and key head; "": there are none.
        v_norm: whether each value head is normalized, without a weight.
        o: the projection of its result.
        gate, up, down: projections of the MLP. gate "": there is none.
        last: norm after the last layer; "": there is none.
        rms: whether norms are RMS norms.
        qkv_bias, o_bias, mlp_bias: whether the products have biases.
        clipped: whether the modules of products limit their inputs and results, and contain the linear layers.
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
    attention_out: str = ""
    mlp_out: str = ""
    q_norm: str = ""
    k_norm: str = ""
    v_norm: bool = False
    last: str = ""
    rms: bool = False
    qkv_bias: bool = True
    o_bias: bool = True
    mlp_bias: bool = True
    clipped: bool = False


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
    frequencies = axial_frequencies(fields, head_dim, "num_heads", 10000.0)
    return RopeSpec(
        "default", head_dim, np.concatenate([frequencies, frequencies]), context=MAX_POSITIONS, room=MAX_POSITIONS,
        axes=(1,) * len(frequencies) + (2,) * len(frequencies),
    )  # fmt: skip


def axial_frequencies(fields: Fields, head_dim: int, name: str, theta: float) -> Frequencies:
    """The frequencies by which one half of a head's elements is rotated: those of a RoPE over `head_dim / 2` elements.

    Args:
        fields: the config.
        head_dim: number of elements of a head.
        name: the field that it depends on.
        theta: `rope_theta` if the config has none.
    """
    if head_dim % 4:
        raise UnsupportedModelError(f"config.{name}: heads of {head_dim} elements cannot be rotated by height and width")
    parameters = fields.get("rope_parameters") or {}
    if (kind := parameters.get("rope_type", "axial")) != "axial":
        raise UnsupportedModelError(f"config.rope_parameters['rope_type'] {shown(kind)} is not supported. Supported: 'axial'.")
    base = positive("rope_parameters['rope_theta']", parameters.get("rope_theta", theta))
    half = head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    return (1.0 / np.power(np.float32(base), exponents)).astype(np.float32)


def tower_graph(
    e: Encoder,
    names: TowerLayer,
    ropes: Sequence[RopeSpec] = (),
    scale: float | None = None,
    relative: RelativePositions | None = None,
) -> Graph:
    """The graph of a tower whose layers are y = x + attention(norm(x)), then y + MLP(norm(y)).

    Args:
        e: the sizes.
        names: the modules.
        ropes: of the parts of a head, one after the other.
        scale: of the scores; None: 1 / sqrt(head_dim).
        relative: relative positions; None: there are none.

    Raises:
        UnsupportedModelError: heads with the terms of relative positions are too wide.
    """
    tables: list[Value] = []

    def norm(nodes: list[Node], x: Value, name: str, path: str) -> Value:
        return rms_norm(nodes, x, name, path, e.eps) if names.rms else layer_norm(nodes, e, x, name, path)

    def layer(nodes: list[Node], x: Value, index: int) -> Value:
        if not tables:
            tables.extend(emit(nodes, "rope_table", (), f"rope{i or ''}", r.rot, rope=r) for i, r in enumerate(ropes))
        name, path = f"l{index}", names.path.format(index)
        normed = norm(nodes, x, f"{name}.attn_in", f"{path}.{names.attention_norm}")
        if relative is not None and relative.padded[index]:
            normed = emit(nodes, "zero_padding", (normed,), f"{name}.attn_kept", e.hidden)
        q, k, v = (_projection(nodes, e, names, normed, f"{name}.{'qkv'[i]}", path, i) for i in range(3))
        q, k = (_rotated(nodes, e, value, tables) for value in (q, k))
        if relative is None:
            attended = attention(nodes, e, (q, k, v), f"{name}.attn", scale=scale)
        else:
            attended = _relative_attention(nodes, e, relative, (q, k, v), name, path, index)
        delta = _product(nodes, names, attended, f"{name}.o", e.hidden, f"{path}.{names.o}", names.o_bias)
        if names.attention_out:
            delta = norm(nodes, delta, f"{name}.attn_normed", f"{path}.{names.attention_out}")
        x = add(nodes, x, delta, f"{name}.attn_out")
        normed = norm(nodes, x, f"{name}.mlp_in", f"{path}.{names.mlp_norm}")
        up = _product(nodes, names, normed, f"{name}.up", e.inner, f"{path}.{names.up}", names.mlp_bias)
        inputs: tuple[Value, ...] = (up,)
        if names.gate:
            inputs = (_product(nodes, names, normed, f"{name}.gate", e.inner, f"{path}.{names.gate}", names.mlp_bias), up)
        inner = emit(nodes, e.activation, inputs, f"{name}.h", e.inner)
        delta = _product(nodes, names, inner, f"{name}.down", e.hidden, f"{path}.{names.down}", names.mlp_bias)
        if names.mlp_out:
            delta = norm(nodes, delta, f"{name}.mlp_normed", f"{path}.{names.mlp_out}")
        return add(nodes, x, delta, f"{name}.out")

    return encoder_graph(e, layer, (lambda nodes, x: norm(nodes, x, "last", names.last)) if names.last else None)


def _product(
    nodes: list[Node],
    names: TowerLayer,
    x: Value,
    name: str,
    width: int,
    module: str,
    bias: bool,
    rows: tuple[int, int, int] | None = None,
) -> Value:
    """A product, between the limits of its module if it has them."""
    if not names.clipped:
        return linear(nodes, x, name, width, module, bias, rows)
    module = module.removesuffix(".linear")

    def clamp(value: Value, which: str) -> Value:
        out = Value(f"{name}_{which}", value.width)
        limits = (f"{module}.{which}_min", f"{module}.{which}_max")
        nodes.append(Node("clamp", (value,), (out,), limits))
        return out

    return clamp(linear(nodes, clamp(x, "input"), name, width, f"{module}.linear", bias, rows), "output")


def _projection(nodes: list[Node], e: Encoder, names: TowerLayer, x: Value, name: str, path: str, part: int) -> Value:
    """q, k or v: of its own matrix, or the rows of one matrix of all three, q's first; with the norm of its heads."""
    module, heads = (names.q, names.k, names.v)[part], e.heads if part == 0 else e.kv_heads
    width = heads * e.head_dim
    rows = (part * width, (part + 1) * width, 3 * width) if names.q == names.k else None
    value = _product(nodes, names, x, name, width, f"{path}.{module}", names.qkv_bias, rows)
    norm = (names.q_norm, names.k_norm, "")[part]
    if not norm and not (part == 2 and names.v_norm):
        return value
    weight = f"{path}.{norm}.weight" if norm else ""
    return emit(nodes, "head_norm", (value,), f"{name}_norm", width, weight, eps=e.eps, heads=heads, head_dim=e.head_dim)


def _relative_attention(
    nodes: list[Node], e: Encoder, relative: RelativePositions, qkv: tuple[Value, ...], name: str, path: str, layer: int
) -> Value:
    """Attention over heads that the terms of relative positions make longer."""
    rows, cols = relative.grids[layer]
    head_dim = e.head_dim + rows + cols
    longer = replace(e, head_dim=head_dim + head_dim % 2)
    if longer.head_dim > MAX_HEAD_DIM:
        raise UnsupportedModelError(
            f"a grid of {rows} x {cols} patches is not supported: with the terms of relative positions, heads of {e.head_dim} "
            f"elements would have {longer.head_dim}, more than {MAX_HEAD_DIM}"
        )
    shape = {"heads": e.heads, "head_dim": e.head_dim, "grid_rows": rows, "grid_cols": cols}
    tables = (f"{path}.{relative.by_row}", f"{path}.{relative.by_col}")
    q, k, v = (Value(f"{name}.{part}_grid", e.heads * longer.head_dim) for part in "qkv")
    nodes.append(Node("grid_queries", qkv[:1], (q,), tables, {**shape, "scale": e.head_dim**-0.5}))
    nodes += [Node("grid_keys", (own,), (made,), attrs=shape) for own, made in zip(qkv[1:], (k, v), strict=True)]
    attended = attention(nodes, longer, (q, k, v), f"{name}.attn_grid", scale=1.0)
    part = {"groups": e.heads, "begin": 0, "end": e.head_dim}
    return emit(nodes, "columns", (attended,), f"{name}.attn", e.heads * e.head_dim, **part)


def _rotated(nodes: list[Node], e: Encoder, x: Value, tables: Sequence[Value]) -> Value:
    """Query or key heads, each part rotated by its RoPE."""
    name, offset = x.name, 0
    for i, table in enumerate(tables):
        shape = {"heads": x.width // e.head_dim, "head_dim": e.head_dim, "interleaved": False, "offset": offset}
        x = emit(nodes, "rope", (x, table), f"{name}_rope{i or ''}", x.width, **shape)
        offset += table.width
    return x
