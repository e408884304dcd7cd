"""Attention with keys and values per head as graph nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..graph.ir import CacheSpec, Graph, Node, Value
from .blocks import Attend, Begin, FeedForward, emit, linear, mlp, rms_norm, scale_by_position, trunk_graph
from .decoder import Decoder
from .mtp import mtp_graph


def decoder_graph(d: Decoder, feed_forward: FeedForward | None = None, begin: Begin | None = None) -> Graph:
    """The unfused graph of a decoder whose attention has keys and values per head.

    Args:
        d: the model's sizes.
        feed_forward: appends the nodes of a layer's feed-forward network; None: all layers have dense MLPs.
        begin: as in `trunk_graph`.
    """
    cache = CacheSpec(d.layers, d.kv_heads, d.head_dim)
    return trunk_graph(d, cache, attention(d), feed_forward or _dense(d), begin=begin)


def decoder_mtp_graph(d: Decoder, depth: int, layers: int) -> Graph:
    """The unfused graph of MTP layer `depth` of `layers`: a layer of the model's kind with full attention and a dense MLP.

    Args:
        d: the model's sizes, the same for all layers but for windows.
    """
    d = replace(d, windows=(*d.windows, *(0,) * layers))
    return mtp_graph(d, CacheSpec(d.layers, d.kv_heads, d.head_dim), attention(d), _dense(d), depth, layers)


def _dense(d: Decoder) -> FeedForward:
    def dense(nodes: list[Node], x: Value, layer: int) -> Value:
        return mlp(nodes, d, x, f"l{layer}.mlp", f"model.layers.{layer}.mlp", d.intermediate)

    return dense


def attention(d: Decoder) -> Attend:
    """Projections, q/k norm, RoPE, cache write, causal attention, gate, output projection."""

    def attend(nodes: list[Node], x: Value, table: Value | None, layer: int) -> Value:
        name, path = f"l{layer}", f"model.layers.{layer}.self_attn"
        kv_heads, head_dim = d.cache_heads_of(layer)
        qkv = _projections(nodes, d, x, layer)
        if d.v_norm and "v" in qkv:
            qkv["v"] = emit(
                nodes, "head_norm", (qkv["v"],), f"{name}.v_norm", qkv["v"].width, eps=d.eps, heads=kv_heads, head_dim=head_dim
            )
        for p, heads in (("q", d.heads), ("k", kv_heads)):
            if p not in qkv:
                continue
            shape = {"heads": heads, "head_dim": head_dim}
            if d.qk_norm and not d.qk_norm_after_rope:
                qkv[p] = _head_norm(nodes, d, qkv[p], name, path, p, shape)
            if table is not None:
                interleaved = d.rope_interleaved
                qkv[p] = emit(
                    nodes, "rope", (qkv[p], table), f"{name}.{p}_rope", qkv[p].width, interleaved=interleaved, **shape
                )
            if d.qk_norm and d.qk_norm_after_rope and table is not None:
                qkv[p] = _head_norm(nodes, d, qkv[p], name, path, p, shape)
        cache = {"layer": d.cache_layer(layer), "kv_heads": kv_heads, "head_dim": head_dim}
        if "k" in qkv:
            nodes.append(Node("cache_write", (qkv["k"], qkv["v"]), attrs=cache))
        q = scale_by_position(nodes, d, qkv["q"], f"{name}.q_scaled", layer)
        limits: dict[str, Any] = {"softcap": d.attention_softcap} if d.attention_softcap else {}
        if d.chunked and d.windows[layer]:
            limits["chunked"] = True
        if d.causal and d.causal[layer]:
            limits["causal"] = True
        sink = f"{path}.{d.head_sinks}" if d.head_sinks else ""
        attended = emit(
            nodes, "attention", (q,), f"{name}.attn", q.width, sink, heads=d.heads, scale=d.scale,
            window=d.windows[layer], softmax="eager", **limits, **cache,
        )  # fmt: skip
        if d.gated:
            attended = emit(nodes, "sigmoid_gate", (attended, qkv["gate"]), f"{name}.attn_gated", attended.width)
        return linear(nodes, attended, f"{name}.o", d.hidden, f"{path}.{d.o_name}", d.o_bias)

    return attend


def _projections(nodes: list[Node], d: Decoder, x: Value, layer: int) -> dict[str, Value]:
    """q, k, v and, if attention has one, its gate, by name; without k and v where a layer reads another's cache."""
    name, path = f"l{layer}", f"model.layers.{layer}.self_attn"
    if d.gated:
        return _gated_projections(nodes, d, x, name, path)
    kv_heads, head_dim = d.cache_heads_of(layer)
    widths = {"q": d.heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    if d.own_kv and not d.own_kv[layer]:
        widths = {"q": widths["q"]}
    elif d.key_is_value and d.key_is_value[layer]:
        del widths["v"]
    values, begin, total = {}, 0, sum(widths.values())
    for p, width in widths.items():
        rows = (begin, begin + width, total) if d.fused_qkv else None
        matrix = f"{path}.{d.fused_qkv or f'{p}_proj'}"
        values[p] = linear(nodes, x, f"{name}.{p}", width, matrix, d.qkv_bias, rows)
        begin += width
    if "k" in values:
        values.setdefault("v", values["k"])
    return values


def _gated_projections(nodes: list[Node], d: Decoder, x: Value, name: str, path: str) -> dict[str, Value]:
    widths = {"q": 2 * d.heads * d.head_dim, "k": d.kv_heads * d.head_dim, "v": d.kv_heads * d.head_dim}
    values = {
        p: linear(nodes, x, f"{name}.{p}{'_gate' if p == 'q' else ''}", width, f"{path}.{p}_proj", d.qkv_bias)
        for p, width in widths.items()
    }
    both = values["q"]
    for i, p in enumerate(("q", "gate")):
        part = {"groups": d.heads, "begin": i * d.head_dim, "end": (i + 1) * d.head_dim}
        values[p] = emit(nodes, "columns", (both,), f"{name}.{p}", both.width // 2, **part)
    return values


def _head_norm(nodes: list[Node], d: Decoder, x: Value, name: str, path: str, p: str, shape: dict[str, Any]) -> Value:
    """The norm of q or k: of each head by itself, or of the whole row."""
    module = d.qk_norm_names[p == "k"]
    weight = f"{path}.{module}"
    if d.qk_norm == "row":
        return rms_norm(nodes, x, f"{name}.{p}_norm", weight, d.eps, d.norm == "rms_offset")
    offset = {"unit_offset": True} if d.norm == "rms_offset" else {}
    return emit(
        nodes,
        "head_norm",
        (x,),
        f"{name}.{p}_norm",
        x.width,
        f"{weight}.weight" if module else "",
        eps=d.eps,
        **offset,
        **shape,
    )
