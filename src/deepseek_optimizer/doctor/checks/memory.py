"""Whether the model, the cache for its context and the buffers fit into what is free."""

from __future__ import annotations

from collections.abc import Iterator

from ..budget import Budget, budget
from ..case import Case
from ..finding import Finding

NAME = "memory"
SMALLER = ("bf16", "int8", "int4")  # formats to turn to, in the order of what they cost in quality


def check(case: Case) -> Iterator[Finding]:
    """Bytes that are needed against bytes that are free. A context that was asked for must fit; the model's own need not."""
    needs = budget(case)
    context = case.context or case.graph.max_positions
    tokens = context * case.batch
    facts = {
        "weights": needs.weights, "cache_per_token": needs.cache_per_token, "kv_cache": needs.kv_cache,
        "buffers": needs.buffers, "context": context, "batch": case.batch, "needed": needs.needed(tokens), "free": needs.free,
        "most_tokens": needs.most_tokens, "weights_in": {name: needs.weights_in(name) for name in SMALLER},
    }  # fmt: skip
    if needs.weights + needs.buffers > needs.free:
        yield Finding(
            NAME, "error", f"the weights do not fit: {_gb(needs.weights)} packed, {_gb(needs.free)} free",
            f"formats: {', '.join(f'{n} {_gb(b)}' for n, b in needs.formats.items())}; buffers {_gb(needs.buffers)}",
            _smaller_weights(needs), facts,
        )  # fmt: skip
        return
    if case.context is not None and case.context > case.graph.max_positions:
        yield Finding(
            NAME, "error", f"a context of {case.context} tokens is beyond the model's {case.graph.max_positions}",
            "it was trained for no more positions", f"{case.graph.max_positions} at most", facts,
        )  # fmt: skip
    granted = case.settings.kv_cache_memory
    if granted is not None and granted < needs.cache_per_token * tokens:
        yield Finding(
            NAME, "error" if case.context else "warning",
            f"kv_cache_memory holds {granted // needs.cache_per_token} of {tokens} tokens",
            f"each takes {needs.cache_per_token / 1024:.1f} KiB in {needs.kv_cache}",
            f"kv_cache_memory={needs.cache_per_token * tokens}, or leave it out to use what is free", facts,
        )  # fmt: skip
    if tokens > needs.most_tokens:
        yield Finding(
            NAME, "error" if case.context else "warning",
            f"{case.batch} x {context} tokens do not fit: {_gb(needs.needed(tokens))} needed, {_gb(needs.free)} free",
            f"weights {_gb(needs.weights)}, cache {needs.cache_per_token / 1024:.1f} KiB a token ({needs.kv_cache}), buffers "
            f"{_gb(needs.buffers)}", _smaller_cache(needs, case.batch), facts,
        )  # fmt: skip
    else:
        yield Finding(
            NAME, "ok", f"{_gb(needs.needed(tokens))} for weights and {case.batch} x {context} tokens, {_gb(needs.free)} free",
            facts=facts,
        )  # fmt: skip


def _smaller_weights(needs: Budget) -> str:
    for name in SMALLER:
        size = needs.weights_in(name)
        if size < needs.weights and size + needs.buffers <= needs.free:
            return f"precision={name!r} takes {_gb(size)}, which fits; or free memory"
    return "no format makes it fit: free memory, raise the container's limit, or take a smaller model"


def _smaller_cache(needs: Budget, batch: int) -> str:
    fixes = [f"limit sequences to {needs.most_tokens // batch} tokens (max_length)"] if needs.most_tokens >= batch else []
    if batch > 1:
        fixes.append("fewer sequences at once (batch_size_range)")
    if needs.kv_cache != "int8":
        fixes.append("kv_cache='int8'")
    fixes += [f"precision={n!r} ({_gb(needs.weights_in(n))})" for n in SMALLER if needs.weights_in(n) < needs.weights * 0.9]
    return "; ".join(fixes + ["(sparse attention, which keeps fewer tokens, is not built yet)"])


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
