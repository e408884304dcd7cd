"""Compiles grammars with xgrammar in a worker (see `engine.worker`), and tries how long their steps take."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

_STEPS = 128  # of the trial
_SLOW, _GROWING = (
    2e-3,
    3e-4,
)  # seconds: a step that takes the first, or the second and ever more, is too slow for others to wait for


def prepare(setup: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """See `engine.worker.Worker`.

    Args:
        setup: {"tokenizer": xgrammar's TokenizerInfo as JSON, "most": bytes that a compiled grammar may have}.
    """
    import xgrammar

    compiler = xgrammar.GrammarCompiler(
        xgrammar.TokenizerInfo.deserialize_json(setup["tokenizer"]), max_threads=1, cache_enabled=False
    )
    # White space is fixed: a model that may write it can go on with it for ever.
    kinds: dict[str, Callable[[Any], Any]] = {
        "json_object": lambda _: compiler.compile_json_schema('{"type": "object"}', any_whitespace=False, strict_mode=False),
        "json_schema": lambda schema: compiler.compile_json_schema(schema, any_whitespace=False),
        "regex": compiler.compile_regex,
        "ebnf": compiler.compile_grammar,
        "structure": compiler.compile_structural_tag,
    }

    def run(payload: dict[str, Any]) -> Any:
        try:
            compiled = kinds[payload["kind"]](payload["source"])
        except RuntimeError as error:
            raise ValueError(_reason(str(error))) from None
        if compiled.memory_size_bytes > setup["most"]:
            raise ValueError("it becomes too large; give it fewer alternatives, optional properties or repetitions")
        _try(xgrammar.GrammarMatcher(compiled), compiled.tokenizer_info)
        text = compiled.serialize_json()
        if len(text) > setup["most"]:
            raise ValueError("it becomes too large; give it fewer alternatives, optional properties or repetitions")
        return text

    return run


def _try(matcher: Any, tokenizer: Any) -> None:
    """Follows a grammar along random tokens: an ambiguous one takes longer at each, and every answer beside it would wait."""
    import numpy as np

    choose = random.Random(0)
    bits = np.zeros((1, -(-tokenizer.vocab_size // 32)), np.int32)
    stops, vocabulary = set(tokenizer.stop_token_ids), tokenizer.decoded_vocab
    times: list[float] = []
    for _ in range(_STEPS):
        began = time.perf_counter()
        some = matcher.fill_next_token_bitmask(bits)
        taken = time.perf_counter() - began
        flags = np.unpackbits(bits.view(np.uint8)[0], bitorder="little")[: len(vocabulary)]
        allowed = np.flatnonzero(flags) if some else np.arange(len(vocabulary))
        short = (
            [t for t in (int(allowed[choose.randrange(len(allowed))]) for _ in range(16)) if t not in stops]
            if len(allowed)
            else []
        )
        if not short:
            return
        token = min(short, key=lambda t: len(vocabulary[t]) or 99)
        began = time.perf_counter()
        if not matcher.accept_token(token):
            return
        times.append(taken + time.perf_counter() - began)
    early, late = sorted(times[16:48])[16], sorted(times[-32:])[16]
    if late > _SLOW or (late > _GROWING and late > 1.6 * early):
        raise ValueError("it is too ambiguous: there are too many ways to read one text")


def _reason(message: str) -> str:
    """xgrammar's, without where in its sources it stands."""
    return message.rpartition(".cc:")[2].partition(":")[2].strip()[:300] or "it is not well formed"
