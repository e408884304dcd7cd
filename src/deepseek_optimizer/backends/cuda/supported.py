"""What the backend runs so far: graphs of encoders, vision towers, and decoders with dense layers or experts; in the cache keys
and values, latents, or rows and entries of compressed attention, and recurrent states. Anything else is refused by name before
anything is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import BackendError
from ...graph.ir import CacheSpec, Graph, Node, RowsSpec
from ...quant.packed import PackedMatrix, PackedStack, PackedWeight
from .layouts import LAYOUTS
from .store import KV_DTYPES

ROW_DTYPES = ("fp32", "bf16")  # of a cache of compressed attention

# Values of attributes that the kernels do not have, by op; an op has all other values of its attributes.
_MISSING: Mapping[str, Mapping[str, Callable[[Any], object]]] = {
    "experts_down": {"of": bool},  # a part of the experts, of a model in several processes
    "experts_gate_up": {"activation": lambda value: value not in ("silu", "gelu"), "of": bool},
    "gate_up": {"activation": lambda value: value not in ("silu", "gelu")},
    "compress": {"offset": lambda value: value % 2 == 1},
}  # fmt: skip
OPS = (
    "add", "add_features", "add_rms_norm", "attention", "block_choose", "cache_write", "clamp", "clamped_swiglu", "columns",
    "compress", "compressed_attention", "concat", "delta_rule", "draft_out", "embedding", "encoder_attention", "entries_choose",
    "experts_down", "experts_gate_up", "gate_up", "geglu", "gelu", "gelu_erf", "grid_keys", "grid_queries", "grouped_linear",
    "hash_router", "head_norm", "hidden_out", "index_choose", "index_write", "latent", "latent_write", "layer_norm", "linear",
    "lm_head", "lookup", "lora_down", "lora_up", "mla_attention", "multiply", "position_scale", "relu", "rms_norm", "rope",
    "rope_cache", "rope_table", "router", "rows_write", "scale", "scale_by", "select_rows", "short_conv", "sigmoid_gate",
    "state_in", "stream_collapse", "stream_expand", "stream_weights", "swiglu", "zero_padding",
)  # fmt: skip


def refuse(what: str, family: str) -> BackendError:
    """The error for what is missing."""
    return BackendError(
        f'the cuda backend does not run {what} of family {family!r} yet; load the model with backend="reference"'
    )


def check_graph_ops(graph: Graph, kv_dtype: str | None = None) -> None:
    """Raises BackendError, naming op and family, if the graph has anything that the kernels do not compute.

    Args:
        kv_dtype: of the cache; None: not known yet.
    """
    for node in graph.nodes:
        if node.op not in OPS:
            raise refuse(f"op {node.op!r}", graph.family)
    for node in graph.nodes:
        if (missing := _missing(node)) is not None:
            raise refuse(missing, graph.family)
    check_cache(graph, kv_dtype)


def check_cache(graph: Graph, kv_dtype: str | None = None) -> None:
    """Raises BackendError if the graph's cache has parts that the kernels do not read, or is of another type."""
    cache = graph.cache
    if cache.newest:
        raise refuse("a cache with copies of the newest tokens", graph.family)
    if cache.summaries and not isinstance(cache, CacheSpec):
        raise refuse("a choice among blocks of latents (attention_optimization='sparse' without an indexer)", graph.family)
    known = ROW_DTYPES if isinstance(cache, RowsSpec) else tuple(KV_DTYPES)
    if kv_dtype is not None and kv_dtype not in known:
        raise BackendError(
            f"the cuda backend does not support KV cache dtype {kv_dtype!r} of family {graph.family!r}; choose kv_cache among "
            f"{', '.join(known)}"
        )


def _missing(node: Node) -> str | None:
    """What the kernels of a node's op do not have."""
    if node.op == "mla_attention" and len(node.inputs) > 1 and node.attrs.get("window", 0):
        return "op 'mla_attention' with a window over chosen tokens"
    for name, missing in _MISSING.get(node.op, {}).items():
        if name in node.attrs and missing(node.attrs[name]):
            return f"op {node.op!r} with {name}={node.attrs[name]!r}"
    return None


def check_matrix(name: str, weight: object, family: str) -> PackedMatrix:
    """The weight, if it is a matrix that the kernels read.

    Raises:
        BackendError: it is missing, not packed, or in a format or an order that they do not read.
    """
    packed = _check_packed(name, weight)
    if not isinstance(packed, PackedMatrix) or packed.order is not None:
        raise refuse(f"stacks and matrices with another order of columns ({name!r})", family)
    return packed


def check_stack(name: str, weight: object) -> PackedStack:
    """The weight, if it is a stack of matrices that the kernels read. Raises BackendError as `check_matrix` does."""
    packed = _check_packed(name, weight)
    if not isinstance(packed, PackedStack):
        raise BackendError(f"weight {name!r} must be a packed stack for the cuda backend, got a {type(packed).__name__}")
    return packed


def _check_packed(name: str, weight: object) -> PackedWeight:
    if weight is None:
        raise BackendError(f"the graph needs weight {name!r}, which the model does not have")
    if not isinstance(weight, PackedWeight):
        raise BackendError(f"weight {name!r} must be packed for the cuda backend, got a {type(weight).__name__}")
    if weight.format not in LAYOUTS:
        raise BackendError(
            f"the cuda backend does not support weight format {weight.format!r} of {name!r}; choose precision among "
            f"{', '.join(LAYOUTS)}, or another backend"
        )
    found, wanted = weight.data.shape[-1], 4 * LAYOUTS[weight.format].tile_words
    if found != wanted:  # kernels would read other memory
        raise BackendError(f"weight {name!r} has tiles of {found} bytes, but those of {weight.format} have {wanted}")
    return weight
