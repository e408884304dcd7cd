"""Memory that a model needs with its settings, computed from file headers: weights, cache and buffers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..backends.base import CompileOptions, Sizes
from ..cache.forgetting import Groups, max_blocks, max_tokens
from ..errors import BackendError
from ..graph.ir import BLOCK, Graph
from ..system.memory import less_reserve
from .case import Case

if TYPE_CHECKING:
    from ..config import DeepSeekConfig

_NO_LIMIT = 1 << 31


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. Attributes:
    weights: packed matrices and plain tensors; tied ones count once.
    cache_per_token: of one sequence: keys and values of all layers, and the block summaries of sparse attention.
    states: recurrent states of the sequences that run at a time, with those that their prefixes store.
    buffers: of the plan, at its largest step.
    free: memory that this process can still allocate.
    granted: maximum size of the cache (`kv_cache_memory`); None: the free memory less a reserve.
    groups: for each group of the cache's layers, which tokens it may drop; None: all tokens stay.
    step: maximum number of tokens of a sequence that are processed at once.
    matrices: shape of each packed matrix or stack, and the smallest format allowed for it.
    formats: bytes of the packed matrices by format.
    """

    weights: int
    cache_per_token: int
    states: int
    buffers: int
    free: int
    granted: int | None
    groups: Groups
    step: int
    kv_cache: str
    matrices: tuple[tuple[tuple[int, ...], str | None], ...]
    formats: dict[str, int]

    def held(self, context: int) -> int:
        """Cached tokens for a sequence of `context` tokens, rounded up to whole blocks. If only some layers drop tokens, or
        there are copies of the newest tokens: the number of tokens that take as much memory in all layers."""
        return -(-max_blocks(self.groups, context, self.step) // self._own_groups) * BLOCK

    def longest(self, sequences: int) -> int:
        """Maximum length of each of `sequences` sequences, in whole blocks."""
        blocks = self.max_tokens // BLOCK * self._own_groups // sequences
        return max_tokens(self.groups, blocks, self.step, _NO_LIMIT)

    @property
    def _own_groups(self) -> int:
        return sum(forgetting is None or not forgetting.copies for forgetting in self.groups)

    def needed(self, tokens: int) -> int:
        """Bytes needed with `tokens` in the cache, over all sequences."""
        return self.weights + self.buffers + self.states + self.cache_per_token * tokens

    @property
    def max_tokens(self) -> int:
        """Maximum number of cached tokens over all sequences, in whole blocks; 0 if not even the weights fit."""
        left = self.free - self.weights - self.buffers
        room = left - self.reserve if self.granted is None else min(left, self.granted)
        return max(0, room - self.states) // (self.cache_per_token * BLOCK) * BLOCK

    @property
    def reserve(self) -> int:
        """Bytes that a cache without an explicit limit leaves free."""
        left = self.free - self.weights - self.buffers
        return left - less_reserve(left)

    def weights_in(self, format_name: str) -> int:
        """Bytes of all weights if every matrix were in this format."""
        from ..config import larger

        packed = sum(_packed_bytes(larger(format_name, least or format_name), shape) for shape, least in self.matrices)
        return self.weights - sum(self.formats.values()) + packed

    def in_format(self, format_name: str) -> MemoryEstimate:
        """The estimate with every matrix in this format, assuming buffers of the same size."""
        return replace(self, weights=self.weights_in(format_name))


def estimate_memory(case: Case) -> MemoryEstimate:
    """Estimates the memory of the case's model from its headers and settings."""
    return memory_of(case.sketch, case.settings, case.graph, case.machine.memory.free, case.batch)


def memory_of(sketch: Any, settings: DeepSeekConfig, graph: Graph, free: int, sequences: int = 1) -> MemoryEstimate:
    """Estimates the memory of a model.

    Args:
        sketch: the model on the meta device, with packed modules.
        settings: what it would be loaded with.
        graph: its graph, with the fusion rules and the attention mode of the settings.
        free: bytes that this process can allocate.
        sequences: number of sequences that run at a time.
    """
    from ..graph.min_formats import exact_weights, min_formats
    from ..integration.bind.graphs import whole_graph
    from ..integration.bind.runnable import kv_dtype
    from ..integration.bind.runtime import groups_of
    from ..integration.bind.swap import expected_tensors
    from ..integration.memory.cache_size import SLOTS_PER_SEQUENCE

    wanted, shapes = expected_tensors(sketch)
    matrices = {name: shapes[name] for name, format_name in wanted.items() if format_name}
    formats: dict[str, int] = {}
    for name, shape in matrices.items():
        format_name = str(wanted[name])
        formats[format_name] = formats.get(format_name, 0) + _packed_bytes(format_name, shape)
    whole = whole_graph(sketch)
    least, exact = min_formats(whole), exact_weights(whole)
    plain = sum(p.nbytes for name, p in sketch.named_parameters() if name in wanted and name not in matrices)
    kv, sizes, high = kv_dtype(settings, formats), _sizes(settings), settings.batch_size_range[1]
    return MemoryEstimate(
        weights=sum(formats.values()) + plain,
        cache_per_token=graph.cache.own_groups * sizes.block_bytes(graph, kv) // BLOCK,
        states=sequences * SLOTS_PER_SEQUENCE * sizes.state_bytes(graph),
        buffers=sizes.buffer_bytes(
            graph,
            dict.fromkeys(exact, "fp32") | {n: str(wanted[n]) for n in matrices},
            CompileOptions(settings.activation),
            max(settings.prefill_chunk, high),
            high,
        ),
        free=free,
        granted=settings.kv_cache_memory,
        groups=groups_of(graph),
        step=settings.prefill_chunk,
        kv_cache=kv,
        matrices=tuple((shape, least.get(name)) for name, shape in matrices.items()),
        formats=formats,
    )


def _packed_bytes(format_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a matrix [rows, cols] or a stack [count, rows, cols]."""
    from ..checkpoint.manifest import PackedEntry

    return math.prod(PackedEntry(format_name, shape).tiles)


def _sizes(settings: DeepSeekConfig) -> Sizes:
    """Sizes in the backend that would be used, without constructing it: its settings may be invalid."""
    import torch

    from ..backends.registry import choose_spec, find

    try:
        return choose_spec(settings, torch.device("cpu"))[0].sizes()
    except BackendError:  # another check reports the reason
        return find("reference").sizes()
