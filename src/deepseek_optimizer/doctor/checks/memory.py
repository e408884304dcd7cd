"""Whether the model, the cache for its context and the buffers fit into the free memory."""

from __future__ import annotations

from collections.abc import Iterator

from ..case import Case
from ..finding import Finding
from ..memory_estimate import MemoryEstimate, estimate_memory
from ..remedies import SMALLER, gb, remedies

NAME = "memory"


def check(case: Case) -> Iterator[Finding]:
    """Compares the memory needed with the memory free. A requested context that does not fit is an error; the model's
    own context that does not fit is a warning."""
    from ...integration.memory.cache_size import with_states

    needs = estimate_memory(case)
    context = case.context or case.graph.max_positions
    tokens = needs.held(context) * case.batch
    facts = {
        "weights": needs.weights, "cache_per_token": needs.cache_per_token, "kv_cache": needs.kv_cache,
        "buffers": needs.buffers, "context": context, "batch": case.batch, "needed": needs.needed(tokens), "free": needs.free,
        "max_tokens": needs.max_tokens, "weights_in": {name: needs.weights_in(name) for name in SMALLER},
    }  # fmt: skip
    if needs.weights + needs.buffers > needs.free:
        yield Finding(
            NAME, "error", f"the weights do not fit: {gb(needs.weights)} packed, {gb(needs.free)} free",
            f"formats: {', '.join(f'{n} {gb(b)}' for n, b in needs.formats.items())}; buffers {gb(needs.buffers)}",
            _smaller_weights(needs), facts,
        )  # fmt: skip
        return
    if case.context is not None and case.context > case.graph.max_positions:
        yield Finding(
            NAME, "error", f"a context of {case.context} tokens is beyond the model's {case.graph.max_positions}",
            "it was not trained for more positions",
            f"use at most {case.graph.max_positions}, or --context-extension yarn --context-length {case.context}",
            facts,
        )  # fmt: skip
    if tokens <= needs.max_tokens:
        yield Finding(
            NAME, "ok", f"{gb(needs.needed(tokens))} for weights and {case.batch} x {context} tokens, {gb(needs.free)} free",
            facts=facts,
        )  # fmt: skip
        return
    cache = with_states(needs.cache_per_token * tokens, needs.states, case.batch)
    parts = [
        f"weights {gb(needs.weights)}",
        f"cache {gb(needs.cache_per_token * tokens)}: {needs.cache_per_token / 1024:.1f} KiB per token in {needs.kv_cache}",
    ]
    if needs.states:
        parts.append(f"recurrent states {gb(needs.states)}")
    parts.append(f"buffers {gb(needs.buffers)}")
    fixes = _smaller_cache(case, needs, context)
    if needs.granted is not None and needs.granted < cache:
        what = f"kv_cache_memory holds {needs.max_tokens} of {tokens} tokens"
        if needs.needed(tokens) <= needs.free:
            fixes.insert(0, f"set kv_cache_memory={cache}, or remove it to use the free memory")
    else:
        what = f"{case.batch} x {context} tokens do not fit: {gb(needs.needed(tokens))} needed, {gb(needs.free)} free"
        if needs.granted is None:
            parts.append(f"reserve {gb(needs.reserve)}")
    yield Finding(NAME, "error" if case.context else "warning", what, "; ".join(parts), "; or ".join(fixes), facts)


def _smaller_weights(needs: MemoryEstimate) -> str:
    for name in SMALLER:
        size = needs.weights_in(name)
        if size < needs.weights and size + needs.buffers <= needs.free:
            return f"use precision={name!r}, which needs {gb(size)} and fits; or free memory"
    return "no format makes it fit: free memory, raise the container's limit, or use a smaller model"


def _smaller_cache(case: Case, needs: MemoryEstimate, context: int) -> list[str]:
    """Settings that fit, best first; then ways to require less."""
    fitting = [remedy for remedy in remedies(case, needs, context) if remedy.fits]
    fixes = [f"{remedy.name} needs {gb(remedy.needed)} ({remedy.price})" for remedy in fitting[:1]]
    if len(fitting) > 1:
        fixes.append(", ".join(f"{remedy.name} ({gb(remedy.needed)})" for remedy in fitting[1:]))
    if (max_length := needs.longest(case.batch)) > 0:
        fixes.append(f"limit sequences to {max_length} tokens (max_length)")
    if case.batch > 1 and needs.max_tokens:
        fixes.append("run fewer concurrent sequences (batch_size_range)")
    return fixes or ["free memory, raise the container's limit, or use a smaller model"]
