"""Bytes that a step of decoding moves between the memory of the device and its kernels, counted from the graph.

Every buffer that a kernel reads or writes counts once for each launch, whether a cache of the device would hold it or not; what
programs of one launch read together, such as a row of x, counts once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...graph.analysis import stack_shapes, weight_shapes
from ...graph.ir import Graph, LatentSpec, Node, RowsSpec
from ...graph.ops.products import rows_of
from ...quant.tiles import tile_counts
from ..base import BLOCK_TOKENS
from ..reference.scaled_rows import groups_of
from .buckets import blocks_bucket, rows_bucket
from .division import HEAD_ROWS, MOST_ROWS, PROGRAMS, chunks_of, splits_of
from .layouts import LAYOUTS
from .store import KV_DTYPES

_FLOAT, _SECTOR = 4, 32  # bytes; the least that is read at a time


@dataclass(frozen=True)
class StepTraffic:
    """Bytes of a step.

    Attributes:
        weights, cache: of packed weights and vectors, and of keys and values or latents, read or written.
        values: of what ops pass on to each other, logits included.
        scratch: of unfinished sums and rows in another order.
        floor: what any engine has to read with weights in these formats and this cache: each weight of the step once, and the
            cached tokens that attention sees.
    """

    weights: int
    cache: int
    values: int
    scratch: int
    floor: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.values + self.scratch


def decode_traffic(graph: Graph, formats: Mapping[str, str], kv_dtype: str, contexts: Sequence[int]) -> StepTraffic:
    """The traffic of a step of decoding, one token of each sequence, whose logits are computed.

    Args:
        formats: format of each packed weight by name; others are fp32.
        contexts: for each sequence the tokens in the cache before the step.
    """
    counted = _Counted(graph, formats, KV_DTYPES[kv_dtype].itemsize, contexts)
    for node in graph.nodes:
        counted.add(node)
    return StepTraffic(counted.weights, counted.cache, counted.values, counted.scratch, counted.floor)


class _Counted:
    """Sums so far. Arguments as of `decode_traffic`."""

    def __init__(self, graph: Graph, formats: Mapping[str, str], item: int, contexts: Sequence[int]) -> None:
        self.weights = self.cache = self.values = self.scratch = self.floor = 0
        self._coded = item == 1  # with float32 scales
        self._formats, self._item, self._contexts = formats, item, contexts
        self._cache, self._states = graph.cache, graph.states
        self._shapes, self._stacks = weight_shapes(graph), stack_shapes(graph)
        self._rows = rows_bucket(len(contexts))
        self._key_item = 2 if self._coded else item  # of keys beside latents
        self._rope = graph.cache.rope if isinstance(graph.cache, LatentSpec) else 0

    def add(self, node: Node) -> None:
        """Counts a node's launches."""
        self.values += sum(_FLOAT * v.width * v.repeat * self._rows for v in (*node.inputs, *node.outputs))
        {
            "embedding": self._embedding, "lookup": self._embedding, "experts_gate_up": self._experts,
            "experts_down": self._experts, "attention": self._attention, "mla_attention": self._latent_attention,
            "cache_write": self._write, "rope_cache": self._write, "latent_write": self._latent_write,
            "index_write": self._index_write, "index_choose": self._choose, "rows_write": self._write_rows,
            "compress": self._compress, "entries_choose": self._choose, "compressed_attention": self._compressed_attention,
            "hash_router": self._hash_router, "delta_rule": self._recurrent, "short_conv": self._recurrent,
        }.get(node.op, self._products)(node)  # fmt: skip

    def _tiles(self, name: str, rows: int, cols: int, count: int = 1) -> int:
        """Bytes of packed matrices."""
        return count * math.prod(tile_counts(rows, cols)) * LAYOUTS[self._format(name)].tile_words * 4

    def _format(self, name: str) -> str:
        return self._formats.get(name, "fp32")

    def _read(self, size: int) -> None:
        self.weights += size
        self.floor += size

    def _recurrent(self, node: Node) -> None:
        """The state of each sequence is read and written."""
        self._products(node)
        size = 2 * _FLOAT * self._states[node.attrs["state"]].elements * len(self._contexts)
        self.cache += size
        self.floor += size

    def _products(self, node: Node) -> None:
        parts = rows_of(node) if "rows" in node.attrs else (None,) * len(node.weights)
        for name, part in zip(node.weights, parts, strict=True):
            shape = self._shapes[name]
            if len(shape) != 2:
                self._read(_FLOAT * math.prod(shape))
                continue
            rows = shape[0] if part is None else part[1] - part[0]
            self._read(self._tiles(name, rows, shape[1]))
            self._product(name, rows, shape[1])
        self._read(sum(_FLOAT * math.prod(self._shapes[name]) for name in node.attrs.get("biases", ()) if name))
        if node.op == "lm_head":  # a captured step's likeliest tokens, and the copy for the caller
            self.values += 3 * _FLOAT * node.outputs[0].width * self._rows

    def _product(self, name: str, rows: int, cols: int) -> None:
        """Sums of splits are written and read; so are rows in the order of words."""
        tile_rows, groups = tile_counts(rows, cols)
        if self._rows <= MOST_ROWS:
            splits = splits_of(tile_rows, groups * LAYOUTS[self._format(name)].words)
            self.scratch += 2 * _FLOAT * splits * self._rows * rows if splits > 1 else 0
        else:
            self.scratch += 2 * (2 if LAYOUTS[self._format(name)].narrow else _FLOAT) * self._rows * groups * 32

    def _embedding(self, node: Node) -> None:
        """The words of a row are a sector apart."""
        name, layout = node.weights[0], LAYOUTS[self._format(node.weights[0])]
        groups = tile_counts(*self._shapes[name])[1]
        self.weights += self._rows * groups * (layout.words + layout.high + (layout.scale != "")) * _SECTOR
        self.floor += len(self._contexts) * groups * layout.tile_words * 4 // 16

    def _experts(self, node: Node) -> None:
        """As many experts as there are pairs, if there are so many."""
        name, a = node.weights[0], node.attrs
        count, rows, cols = self._stacks[name]
        pairs = len(self._contexts) * a["top_k"]
        used = min(a["experts"], pairs) * count // a["experts"]
        self._read(self._tiles(name, rows, cols, used))
        biases = sum(math.prod(self._shapes[bias]) for bias in a.get("biases", ()) if bias)
        self._read(_FLOAT * biases * used // count)
        if node.op == "experts_down":
            self.scratch += 2 * _FLOAT * self._rows * a["top_k"] * rows

    def _write(self, node: Node) -> None:
        keys = node.inputs[1:3] if node.op == "rope_cache" else node.inputs
        scales = 2 * node.attrs["kv_heads"] * _FLOAT if self._coded else 0
        self.cache += self._rows * (sum(value.width for value in keys) * self._item + scales)

    def _latent_write(self, node: Node) -> None:
        self.cache += self._rows * self._latent_bytes(self._rope, node.inputs[0].width - self._rope)

    def _index_write(self, node: Node) -> None:
        self.cache += self._rows * node.inputs[0].width * self._key_item

    def _latent_bytes(self, rope: int, rank: int) -> int:
        """Of a token: its latent and rotated key."""
        return rope * self._key_item + rank * self._item + (_FLOAT * groups_of(rank) if self._coded else 0)

    def _attention(self, node: Node) -> None:
        a = node.attrs
        heads, width = a["heads"], a["head_dim"]
        scales = 2 * a["kv_heads"] * _FLOAT if self._coded else 0
        self._attend(node, 2 * a["kv_heads"] * width * self._item + scales, heads, a["kv_heads"], width)
        self._read(sum(_FLOAT * math.prod(self._shapes[name]) for name in node.weights))

    def _latent_attention(self, node: Node) -> None:
        """Queries to latents, attention, and latents to values, by the stacks of `kv_b`."""
        a, (name,) = node.attrs, node.weights
        heads, rank = a["heads"], a["rank"]
        keys = "fp32" if self._format(name) == "fp32" else "bf16"
        self.floor += self._tiles(name, heads * (a["nope"] + a["v_dim"]), rank)
        self.weights += heads * math.prod(tile_counts(rank, a["nope"])) * LAYOUTS[keys].tile_words * 4
        self.weights += self._tiles(name, heads * a["v_dim"], rank)
        self.scratch += 4 * _FLOAT * self._rows * heads * rank  # written, read as queries, replaced, and read again
        self._attend(node, self._latent_bytes(a["rope"], rank), heads, -(-heads // HEAD_ROWS), rank)

    def _choose(self, node: Node) -> None:
        """The indexer reads a key of each token, or entry. Its scores are written, and read for each of 32 bits and three times
        more."""
        width = node.inputs[0].width // node.attrs["heads"]
        tokens = sum((context + 1) // node.attrs.get("every", 1) for context in self._contexts)
        self.cache += tokens * width * self._key_item
        self.floor += tokens * width * self._key_item
        self.scratch += 36 * _FLOAT * tokens

    def _write_rows(self, node: Node) -> None:
        self.cache += self._rows * node.inputs[0].width * self._item

    def _compress(self, node: Node) -> None:
        """An entry of each sequence whose token completes one."""
        assert isinstance(self._cache, RowsSpec)
        a, source = node.attrs, self._cache.rows[node.attrs["source"]]
        made = sum((context + 1) % a["every"] == 0 for context in self._contexts)
        tokens = a["every"] * (2 if a["overlap"] else 1)
        self.cache += made * (tokens * source.width + self._cache.rows[a["layer"]].width) * self._item
        self._read(_FLOAT * sum(math.prod(self._shapes[name]) for name in node.weights) * min(made, 1))

    def _hash_router(self, node: Node) -> None:
        """The table's rows of the step's tokens, besides the product."""
        name, table = node.weights
        self._read(self._tiles(name, *self._shapes[name]))
        self._product(name, *self._shapes[name])
        self._read(4 * len(self._contexts) * self._shapes[table][1])

    def _compressed_attention(self, node: Node) -> None:
        """Each block of heads reads the window and the entries, of which all but the first do so from the L2 cache."""
        a, (sinks,) = node.attrs, node.weights
        row = a["head_dim"] * self._item
        for context in self._contexts:
            first = max(context + 1 - a["window"], 0) // BLOCK_TOKENS * BLOCK_TOKENS
            entries = (context + 1) // a["every"] if a["entries"] >= 0 else 0
            if len(node.inputs) > 1:
                entries = min(entries, node.inputs[1].width)
            self.cache += (context + 1 - first + entries) * row
            self.floor += (min(context + 1, a["window"]) + entries) * row
        self._read(_FLOAT * math.prod(self._shapes[sinks]))

    def _attend(self, node: Node, token_bytes: int, heads: int, programs: int, width: int) -> None:
        """Reads tokens of this size; writes and reads what chunks of `programs` programs leave, rows of `width`."""
        window, sinks = node.attrs.get("window", 0), node.attrs.get("sinks", 0)
        chosen = node.inputs[1].width if node.op == "mla_attention" and len(node.inputs) > 1 else 0
        for context in self._contexts:
            read = seen = min(context + 1, chosen or context + 1)
            if window:
                own = context % window + 1 if node.attrs.get("chunked", False) else window
                first = max(context + 1 - own, 0) // BLOCK_TOKENS * BLOCK_TOKENS
                read = min(read, read - first + min(-(-sinks // BLOCK_TOKENS) * BLOCK_TOKENS, first))
                seen = min(seen, own + sinks)
            self.cache += read * token_bytes
            self.floor += seen * token_bytes
        longest = max(self._contexts) + 1
        blocks = blocks_bucket(-(-min(longest, chosen or longest) // BLOCK_TOKENS))
        chunks = chunks_of(self._rows, blocks, programs)
        if chunks > 1:
            self.scratch += 2 * _FLOAT * min(self._rows * heads * chunks, PROGRAMS * heads) * (width + 2)
