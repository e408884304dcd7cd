"""What makes a long context fit, and how much memory each takes: predicted from headers, as the need itself is."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..config import DeepSeekConfig
from ..errors import ConfigError
from .budget import Budget, budget
from .case import Case

SMALLER = ("bf16", "int8", "int4")  # formats to turn to, in the order of what they cost in quality
# Tokens of the longest prompt that `dso longdoc` needs: a chunk (LongDocument's max_length), its reply (longdoc's Limits), and
# what is asked and written around it.
LONGDOC_TOKENS = 4096 + 512 + 512


@dataclass(frozen=True)
class Remedy:
    """
    Attributes:
        name: fields of `DeepSeekConfig`, or a command.
        price: what changes beside the memory.
        needed: bytes with it: weights, buffers and cache.
        fits: whether these are there.
    """

    name: str
    price: str
    needed: int
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"name": self.name, "price": self.price, "needed": self.needed, "fits": self.fits}


def remedies(case: Case, needs: Budget, context: int) -> list[Remedy]:
    """What takes less memory than the case's settings, which need `needs`, for `case.batch` texts of `context` tokens: in the
    order in which to try, whether it fits or not."""
    now = needs.needed(needs.held(context) * case.batch)
    return [remedy for remedy in _all(case, needs, context) if remedy.needed < now]


def _all(case: Case, needs: Budget, context: int) -> Iterator[Remedy]:
    mode = case.settings.attention.kind
    if not (case.settings.sparse_attention and needs.kv_cache == "int8"):
        yield _sparse(case, context)
    if mode != "sliding":
        fields: dict[str, Any] = {"attention_optimization": "sliding", "sparse_attention": False, "attention_window": None}
        twin = case.with_fields(**fields)
        yield _mode(
            twin, budget(twin), context, 'attention_optimization="sliding"',
            f"a token sees the latest {twin.settings.attention.window} and the first {twin.settings.attention.sinks}",
        )  # fmt: skip
    if context > LONGDOC_TOKENS:
        tokens = needs.held(LONGDOC_TOKENS)
        yield Remedy(
            f"dso longdoc {shlex.quote(str(case.model))} FILE",
            "--strategy retrieve reads the passages that have a question's words, map_reduce all, a chunk at a time",
            needs.needed(tokens), tokens <= needs.max_tokens,
        )  # fmt: skip
    tokens = needs.held(context) * case.batch
    for name in SMALLER:
        smaller = needs.in_format(name)
        if smaller.weights < needs.weights * 0.9:
            yield Remedy(f"precision={name!r}", "weights are rounded", smaller.needed(tokens), tokens <= smaller.max_tokens)
    if needs.kv_cache != "int8":
        twin = case.with_fields(kv_cache="int8")
        yield _mode(twin, budget(twin), context, "kv_cache='int8'", "keys and values are rounded")


def _sparse(case: Case, context: int) -> Remedy:
    """With a model in fp32 the cache is only in int8 where that is said."""
    price = "cache in int8; a token sees {} of the tokens before it, those that it ranks highest"
    name = "sparse_attention=True"
    window = case.settings.attention_window if case.settings.attention.kind == "sparse" else None
    twin = case.with_fields(sparse_attention=True, attention_optimization="flash", attention_window=window)
    try:
        _ = twin.settings.attention
    except ConfigError:  # a budget that no mode has read so far
        twin = twin.with_fields(attention_budget=DeepSeekConfig.attention_budget)
        name = f"{name}, attention_budget={twin.settings.attention_budget}"
    needs = budget(twin)
    if needs.kv_cache != "int8":
        twin = twin.with_fields(kv_cache="int8")
        name, needs = f"{name}, kv_cache='int8'", budget(twin)
    return _mode(twin, needs, context, name, price.format(twin.settings.attention.budget))


def _mode(twin: Case, needs: Budget, context: int, name: str, price: str) -> Remedy:
    tokens = needs.held(context) * twin.batch
    return Remedy(name, price, needs.needed(tokens), tokens <= needs.max_tokens)


def gb(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.2f} GB"
