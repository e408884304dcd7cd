"""How much memory a model takes with its settings, reckoned from headers: weights, cache and buffers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..graph.ir import BLOCK
from ..system.memory import less_reserve
from .case import Case


@dataclass(frozen=True)
class Budget:
    """Bytes. Attributes:
    weights: packed matrices and plain tensors, tied ones once.
    cache_per_token: of one sequence, all layers, K and V and what sparse attention keeps of blocks.
    buffers: the plan's, at its largest step.
    free: what this process can still take.
    granted: what the settings allow the cache at most (`kv_cache_memory`); None: what is free, less a reserve.
    span: tokens that a sequence holds at most, however long it is, where attention lets the cache forget; None: all.
    matrices: of the packed matrices and stacks the shape, and the format that a precision does not make them smaller than.
    formats: bytes of the packed matrices by format.
    """

    weights: int
    cache_per_token: int
    buffers: int
    free: int
    granted: int | None
    span: int | None
    kv_cache: str
    matrices: tuple[tuple[tuple[int, ...], str | None], ...]
    formats: dict[str, int]

    def held(self, context: int) -> int:
        """Tokens in the cache for a sequence of `context` tokens: whole blocks."""
        held = context if self.span is None else min(context, self.span)
        return -(-held // BLOCK) * BLOCK

    def needed(self, tokens: int) -> int:
        """Bytes with `tokens` in the cache, over all sequences."""
        return self.weights + self.buffers + self.cache_per_token * tokens

    @property
    def max_tokens(self) -> int:
        """Tokens that the cache can get beside the weights, over all sequences: whole blocks. 0 where not even those fit."""
        left = self.free - self.weights - self.buffers
        room = left - self.reserve if self.granted is None else min(left, self.granted)
        return max(0, room) // (self.cache_per_token * BLOCK) * BLOCK

    @property
    def reserve(self) -> int:
        """What a cache that nothing else bounds leaves free."""
        left = self.free - self.weights - self.buffers
        return left - less_reserve(left)

    def weights_in(self, format_name: str) -> int:
        """Bytes of all weights if every matrix were in this format."""
        from ..config import larger

        packed = sum(_packed_bytes(larger(format_name, least or format_name), shape) for shape, least in self.matrices)
        return self.weights - sum(self.formats.values()) + packed

    def in_format(self, format_name: str) -> Budget:
        """The budget with every matrix in this format; buffers are taken to be as large."""
        return replace(self, weights=self.weights_in(format_name))


def budget(case: Case) -> Budget:
    """The budget of the case's model."""
    from ..graph.least import exact_weights, least_formats
    from ..integration.bind.graphs import whole_graph
    from ..integration.bind.runtime import kv_dtype
    from ..integration.bind.swap import expected_tensors

    wanted, shapes = expected_tensors(case.sketch)
    matrices = {name: shapes[name] for name, format_name in wanted.items() if format_name}
    formats: dict[str, int] = {}
    for name, shape in matrices.items():
        format_name = str(wanted[name])
        formats[format_name] = formats.get(format_name, 0) + _packed_bytes(format_name, shape)
    whole = whole_graph(case.sketch)
    least, exact = least_formats(whole), exact_weights(whole)
    plain = sum(p.nbytes for name, p in case.sketch.named_parameters() if name in wanted and name not in matrices)
    kv = kv_dtype(case.settings, formats)
    return Budget(
        weights=sum(formats.values()) + plain,
        cache_per_token=_block_bytes(case, kv) // BLOCK,
        buffers=_buffers(case, dict.fromkeys(exact, "fp32") | {n: str(wanted[n]) for n in matrices}),
        free=case.machine.memory.free,
        granted=case.settings.kv_cache_memory,
        span=_span(case),
        kv_cache=kv,
        matrices=tuple((shape, least.get(name)) for name, shape in matrices.items()),
        formats=formats,
    )


def _span(case: Case) -> int | None:
    from ..integration.bind.runtime import forgetting_of

    forgets = forgetting_of(case.graph)
    return None if forgets is None else forgets.blocks(case.settings.prefill_chunk) * BLOCK


def _packed_bytes(format_name: str, shape: tuple[int, ...]) -> int:
    """Of a matrix [rows, cols] or a stack [count, rows, cols]."""
    from ..checkpoint.manifest import PackedEntry

    return math.prod(PackedEntry(format_name, shape).tiles)


def _block_bytes(case: Case, kv: str) -> int:
    """Of the backend that would serve, asked without making it: its settings may be what is wrong."""
    from ..backends.cpu import native, unavailable_reason
    from ..backends.reference import ReferenceBackend

    if case.settings.backend == "reference" or unavailable_reason() is not None:
        return ReferenceBackend().block_bytes(case.graph, kv)
    return native.block_bytes(case.graph.cache, kv)


def _buffers(case: Case, format_of: dict[str, str]) -> int:
    """What the native plan reserves for its largest step. The reference backend makes and drops the same rows in fp32."""
    from ..backends.cpu import native, unavailable_reason
    from ..backends.cpu.compile import ACTIVATIONS, INTEGER_FORMATS
    from ..backends.cpu.lower import lower
    from ..graph.planner import assign_slots
    from ..quant import get_format

    def kind_of(name: str) -> str:
        forced = ACTIVATIONS.get(case.settings.activation) if format_of[name] in INTEGER_FORMATS else None
        return forced or get_format(format_of[name]).activation

    def row_bytes(kind: str, width: int) -> int:
        if unavailable_reason() is not None:
            return 4 * width
        return int(native.library().dso_row_bytes(native.SLOT_KINDS[kind], width))

    lowered: Any = lower(case.graph, kind_of, lambda name: format_of[name])
    high = case.settings.batch_size_range[1]
    tokens = max(case.settings.prefill_chunk, high)
    slots = assign_slots(lowered).slots
    return sum(s.repeat * row_bytes(s.kind, s.width) * (high if s.selected else tokens) for s in slots)
