"""Ways to make a long context fit, with the memory each needs, predicted from file headers."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..config import DeepSeekConfig
from ..errors import ConfigError
from .case import Case
from .memory_estimate import MemoryEstimate, estimate_memory

SMALL_CACHES = ("int8", "int4")  # formats of the cache to try, in order of increasing quality loss
SMALLER = ("bf16", "int8", "int4")  # formats to try, in order of increasing quality loss
# Longest prompt of `dso longdoc` in tokens: a chunk (LongDocument's max_length), its reply (longdoc's Limits), and the question
# with its instructions.
LONGDOC_TOKENS = 4096 + 512 + 512


@dataclass(frozen=True)
class Remedy:
    """
    Attributes:
        name: fields of `DeepSeekConfig`, or a command.
        price: what else changes.
        needed: bytes of weights, buffers and cache with it.
        fits: whether that much memory is free.
    """

    name: str
    price: str
    needed: int
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"name": self.name, "price": self.price, "needed": self.needed, "fits": self.fits}


def remedies(case: Case, needs: MemoryEstimate, context: int) -> list[Remedy]:
    """Settings that need less memory than those of the case (`needs`) for `case.batch` texts of `context` tokens, in the order
    to try them, whether or not they fit."""
    now = needs.needed(needs.held(context) * case.batch)
    return [remedy for remedy in _all(case, needs, context) if remedy.needed < now]


def _all(case: Case, needs: MemoryEstimate, context: int) -> Iterator[Remedy]:
    mode = case.settings.attention.kind
    if not (case.settings.sparse_attention and needs.kv_cache in SMALL_CACHES):
        yield _sparse(case, context)
    if mode != "sliding":
        fields: dict[str, Any] = {"attention_optimization": "sliding", "sparse_attention": False, "attention_window": None}
        twin = case.with_fields(**fields)
        yield _mode(
            twin, estimate_memory(twin), context, 'attention_optimization="sliding"',
            f"each token attends to the latest {twin.settings.attention.window} tokens and the first "
            f"{twin.settings.attention.sinks}",
        )  # fmt: skip
    if context > LONGDOC_TOKENS:
        tokens = needs.held(LONGDOC_TOKENS)
        yield Remedy(
            f"dso longdoc {shlex.quote(str(case.model))} FILE",
            "--strategy retrieve reads only passages that contain words of the question; map_reduce reads everything in chunks",
            needs.needed(tokens), tokens <= needs.max_tokens,
        )  # fmt: skip
    tokens = needs.held(context) * case.batch
    for name in SMALLER:
        smaller = needs.in_format(name)
        if smaller.weights < needs.weights * 0.9:
            yield Remedy(f"precision={name!r}", "weights are quantized", smaller.needed(tokens), tokens <= smaller.max_tokens)
    for kind in SMALL_CACHES:
        if needs.kv_cache != kind:
            twin = case.with_fields(kv_cache=kind)
            yield _mode(twin, estimate_memory(twin), context, f"kv_cache={kind!r}", "keys and values are quantized")


def _sparse(case: Case, context: int) -> Remedy:
    """A model in fp32 has an int8 cache only if that is set explicitly."""
    price = "the cache is in {}; each token attends to the {} highest-ranked earlier tokens"
    name = "sparse_attention=True"
    window = case.settings.attention_window if case.settings.attention.kind == "sparse" else None
    twin = case.with_fields(sparse_attention=True, attention_optimization="flash", attention_window=window)
    try:
        _ = twin.settings.attention
    except ConfigError:  # the budget is invalid, but no mode has used it so far
        twin = twin.with_fields(attention_budget=DeepSeekConfig.attention_budget)
        name = f"{name}, attention_budget={twin.settings.attention_budget}"
    needs = estimate_memory(twin)
    if needs.kv_cache not in SMALL_CACHES:
        twin = twin.with_fields(kv_cache="int8")
        name, needs = f"{name}, kv_cache='int8'", estimate_memory(twin)
    return _mode(twin, needs, context, name, price.format(needs.kv_cache, twin.settings.attention.budget))


def _mode(twin: Case, needs: MemoryEstimate, context: int, name: str, price: str) -> Remedy:
    tokens = needs.held(context) * twin.batch
    return Remedy(name, price, needs.needed(tokens), tokens <= needs.max_tokens)


def gb(size: float) -> str:
    """A size in GB, as text."""
    return f"{size / 1e9:.2f} GB"
