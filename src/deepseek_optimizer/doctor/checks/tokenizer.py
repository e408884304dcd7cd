"""The tokenizer: whether it is there, fits the weights, has a chat template, and ends its answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...errors import CheckpointError
from ..case import Case
from ..finding import Finding

NAME = "tokenizer"
_PROBE = "The quick brown fox doesn't jump over 1,234 lazy dogs."


def check(case: Case) -> Iterator[Finding]:
    """A model that gets other tokens than it was trained on answers with garbage; one without an end marker never stops."""
    try:
        tokenizer = case.tokenizer
    except CheckpointError as error:
        yield Finding(
            NAME, "error", "there is no tokenizer that fits these weights", str(error),
            "put the tokenizer files of the original model (tokenizer.json, tokenizer_config.json) beside the weights",
            {"vocab_size": case.sketch.config.vocab_size},
        )  # fmt: skip
        return
    ends = _ends(case.generation_config.eos_token_id)
    facts: dict[str, Any] = {
        "tokens": len(tokenizer), "vocab_size": case.sketch.config.vocab_size, "chat_template": bool(tokenizer.chat_template),
        "eos_token": tokenizer.eos_token, "eos_token_id": sorted(ends),
    }  # fmt: skip
    found = [*_round_trip(tokenizer, facts), *_template(tokenizer, facts), *_end(tokenizer, ends, facts)]
    yield from found or [Finding(NAME, "ok", f"{len(tokenizer)} tokens, a chat template, and an end marker", facts=facts)]


def _round_trip(tokenizer: Any, facts: dict[str, Any]) -> Iterator[Finding]:
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    back = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if "".join(back.split()) != "".join(_PROBE.split()):
        yield Finding(
            NAME, "warning", "the tokenizer loses text: plain English does not survive encoding and decoding",
            f"{_PROBE!r} came back as {back!r}", "fetch the tokenizer files of the original model again", facts,
        )  # fmt: skip


def _template(tokenizer: Any, facts: dict[str, Any]) -> Iterator[Finding]:
    if not tokenizer.chat_template:
        yield Finding(
            NAME, "warning", "there is no chat template",
            "a model trained on dialogues that gets bare text continues it instead of answering; a base model is meant to",
            "put chat_template.jinja or tokenizer_config.json of the original model beside the weights; for a base model use "
            "`dso run --raw`", facts,
        )  # fmt: skip
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program: it raises whatever it likes
        yield Finding(
            NAME, "error", "the chat template fails on a single question", f"{type(error).__name__}: {error}",
            "fetch the original model's template again", facts,
        )  # fmt: skip


def _end(tokenizer: Any, ends: set[int], facts: dict[str, Any]) -> Iterator[Finding]:
    own = tokenizer.eos_token_id
    if not ends:
        yield Finding(
            NAME, "warning", "generation has no end marker, so every answer runs to its length limit",
            "neither generation_config.json nor config.json names an eos_token_id",
            f'set "eos_token_id": {own if own is not None else "the id of the end marker"} in generation_config.json', facts,
        )  # fmt: skip
    elif own is not None and own not in ends:
        yield Finding(
            NAME, "warning", f"the tokenizer ends turns with {tokenizer.eos_token!r} ({own}), where generation does not stop",
            f"generation stops at {sorted(ends)} only", f'set "eos_token_id": {sorted({own, *ends})} in generation_config.json',
            facts,
        )  # fmt: skip


def _ends(value: Any) -> set[int]:
    return set() if value is None else set(value) if isinstance(value, (list, tuple)) else {int(value)}
