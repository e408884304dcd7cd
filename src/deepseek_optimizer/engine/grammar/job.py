"""Compiles grammars with xgrammar in a worker process (see `system.sandbox.worker`) and times their steps."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from typing import Any

# xgrammar's rule for a character of a string of bounded length, and its replacement: in xgrammar 0.2.8 it allows control
# characters and unpaired surrogates. The replacement has no escapes: with them, computing a mask takes a second.
_CHARACTERS = re.compile(r"(?m)^(\w+ ::= \(\()\[\^\\\"\\\\\\r\\n\](\)\))$")
_CHARACTER = r"[\U00000020-\U00000021\U00000023-\U0000005b\U0000005d-\U0000d7ff\U0000e000-\U0010ffff]"
# White space as models write it: one space after a comma or colon, or a new line and its indentation; or none. A model that may
# write any can repeat it without end, and one that may write none continues strings, since a closing quote and a new line are
# often one token.
_SPACES = """
dso_value ::= ("" | " ")
dso_item ::= ("" | " " | ("\\n" [ ]{0, 20}))
dso_line ::= ("" | ("\\n" [ ]{0, 20}))
"""
_EMPTY = re.compile(r'"([{\[])" "([}\]])"')
_DIGITS = re.compile(r"\[0-9\]\*")  # of a number without bounds
_DIGIT = re.compile(r"(?m)^(\w+) ::= \(\(\[0-9\]\)\)$")  # a rule for one digit
_ANY_OBJECT = {"schema": {"type": "object", "additionalProperties": True}, "rules": {}}
_WALKS, _STEPS = 4, 96  # number of random texts to time, and of tokens of each
_SLOW, _GROWING = 2e-3, 3e-4  # maximum seconds of a step, and of a step of a grammar whose steps get slower


def prepare(setup: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """Prepares the job, see `system.sandbox.worker.Worker`.

    Args:
        setup: {"tokenizer": xgrammar's TokenizerInfo as JSON, "max_bytes": maximum size of a compiled grammar}.
    """
    import xgrammar

    compiler = xgrammar.GrammarCompiler(
        xgrammar.TokenizerInfo.deserialize_json(setup["tokenizer"]), max_threads=1, cache_enabled=False
    )

    def structure(source: str) -> Any:
        return compiler.compile_structural_tag(json.dumps(_with_grammars(json.loads(source), xgrammar)))

    kinds: dict[str, Callable[[Any], Any]] = {
        "json_object": lambda _: compiler.compile_grammar(_ebnf(_ANY_OBJECT, xgrammar)),
        "json_schema": lambda source: compiler.compile_grammar(_ebnf(json.loads(source), xgrammar)),
        "ebnf": compiler.compile_grammar,
        "lark": lambda source: compiler.compile_grammar(xgrammar.Grammar.from_lark(source)),
        "structure": structure,
        "calls": structure,
    }

    def run(payload: dict[str, Any]) -> Any:
        try:
            compiled = kinds[payload["kind"]](payload["source"])
        except RuntimeError as error:
            raise ValueError(_reason(str(error))) from None
        if compiled.memory_size_bytes > setup["max_bytes"]:
            raise ValueError("the grammar is too large; use fewer alternatives, optional properties or repetitions")
        _try(compiled, xgrammar)
        text = compiled.serialize_json()
        if len(text) > setup["max_bytes"]:
            raise ValueError("the grammar is too large; use fewer alternatives, optional properties or repetitions")
        return text

    return run


def _ebnf(enforced: dict[str, Any], xgrammar: Any) -> str:
    """Converts an `Enforced` schema to EBNF: xgrammar's grammar with our rules for patterns and characters.

    White space and digits are bounded, so that a text is as long as its strings, lists and objects require. Strings without
    `maxLength` are not bounded.
    """
    text = _bounded(str(xgrammar.Grammar.from_json_schema(json.dumps(enforced["schema"]), any_whitespace=False)))
    for name, rules in enforced["rules"].items():
        place = f'Regex("^{name}$", json_string=true)'
        if place not in text:
            raise ValueError("patterns are not supported with the installed release of xgrammar; remove the pattern")
        text = text.replace(place, name) + f"\n{rules}\n"
    return _CHARACTERS.sub(lambda rule: f"{rule[1]}{_CHARACTER}{rule[2]}", text)


def _bounded(text: str) -> str:
    """Returns xgrammar's grammar for compact JSON with white space as in _SPACES, and with at most 40 digits in a row.

    A quotation mark within a text of the schema has a backslash in EBNF, so that these strings occur only as punctuation.
    """
    text = _EMPTY.sub(r'"\1\2"', text)
    for mark, spaced in (('", "', '"," dso_item'), ('": "', '":" dso_value')):
        text = text.replace(mark, spaced)
    for begin, end in ("{}", "[]"):
        text = text.replace(f'"{begin}" ', f'"{begin}" dso_line ').replace(f' "{end}"', f' dso_line "{end}"')
    text = _DIGITS.sub("[0-9]{0, 39}", text)
    for name in _DIGIT.findall(text):
        text = re.sub(rf"\b{name}\{{(\d+), -1\}}", rf"{name}{{\1, 40}}", text)
    return text + _SPACES


def _with_grammars(value: Any, xgrammar: Any) -> Any:
    """Replaces the `Enforced` schemas in a structural tag by grammars."""
    if isinstance(value, list):
        return [_with_grammars(item, xgrammar) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"schema", "rules"}:
        return {"type": "grammar", "grammar": _ebnf(value, xgrammar)}
    return {key: _with_grammars(item, xgrammar) for key, item in value.items()}


def _try(compiled: Any, xgrammar: Any) -> None:
    """Times a grammar on random texts; raises ValueError for an ambiguous one, whose slow steps would delay other requests."""
    import numpy as np

    tokenizer = compiled.tokenizer_info
    bits = np.zeros((1, -(-tokenizer.vocab_size // 32)), np.int32)
    stops, vocabulary = set(tokenizer.stop_token_ids), tokenizer.decoded_vocab
    for walk in range(_WALKS):
        choose, matcher = random.Random(walk), xgrammar.GrammarMatcher(compiled)
        times: list[float] = []
        while len(times) < _STEPS:
            began = time.perf_counter()
            constrained = matcher.fill_next_token_bitmask(bits)
            taken = time.perf_counter() - began
            flags = np.unpackbits(bits.view(np.uint8)[0], bitorder="little")[: len(vocabulary)]
            allowed = np.flatnonzero(flags) if constrained else np.arange(len(vocabulary))
            drawn = [int(allowed[choose.randrange(len(allowed))]) for _ in range(16)] if len(allowed) else []
            drawn = [token for token in drawn if token not in stops]
            if not drawn:
                break
            token = min(drawn, key=lambda t: len(vocabulary[t]) or 99) if walk % 2 == 0 else drawn[0]
            began = time.perf_counter()
            if not matcher.accept_token(token):
                break
            times.append(taken + time.perf_counter() - began)
        if len(times) == _STEPS:
            early, late = (sorted(part)[len(part) // 2] for part in (times[16:48], times[-32:]))
            if late > _SLOW or (late > _GROWING and late > 1.6 * early):
                raise ValueError("the grammar is too ambiguous: one text can be parsed in too many ways")


def _reason(message: str) -> str:
    """Returns xgrammar's message without the place in its source code."""
    return message.rpartition(".cc:")[2].partition(":")[2].strip()[:300] or "the grammar is not well formed"
