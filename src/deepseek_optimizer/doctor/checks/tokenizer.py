"""Whether the tokenizer exists, matches the weights, has a chat template, and has an end-of-sequence token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...errors import CheckpointError
from ..case import Case
from ..finding import Finding

NAME = "tokenizer"
_PROBE = "The quick brown fox doesn't jump over 1,234 lazy dogs."


def check(case: Case) -> Iterator[Finding]:
    """With the wrong tokens, a model produces garbage; without an end-of-sequence token, it never stops."""
    try:
        tokenizer = case.tokenizer
    except CheckpointError as error:
        yield Finding(
            NAME, "error", "there is no tokenizer that matches these weights", str(error),
            "put the tokenizer files of the original model (tokenizer.json, tokenizer_config.json) next to the weights",
            {"vocab_size": case.sketch.config.vocab_size},
        )  # fmt: skip
        return
    eos_ids = _ids(case.generation_config.eos_token_id)
    facts: dict[str, Any] = {
        "tokens": len(tokenizer), "vocab_size": case.sketch.config.vocab_size, "chat_template": bool(tokenizer.chat_template),
        "eos_token": tokenizer.eos_token, "eos_token_id": sorted(eos_ids),
    }  # fmt: skip
    findings = [*_round_trip(tokenizer, facts), *_template(tokenizer, facts), *_end(tokenizer, eos_ids, facts)]
    what = f"{len(tokenizer)} tokens, a chat template, and an end-of-sequence token"
    yield from findings or [Finding(NAME, "ok", what, facts=facts)]


def _round_trip(tokenizer: Any, facts: dict[str, Any]) -> Iterator[Finding]:
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    back = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if "".join(back.split()) != "".join(_PROBE.split()):
        yield Finding(
            NAME, "warning", "the tokenizer loses text: plain English does not survive encoding and decoding",
            f"{_PROBE!r} came back as {back!r}", "download the tokenizer files of the original model again", facts,
        )  # fmt: skip


def _template(tokenizer: Any, facts: dict[str, Any]) -> Iterator[Finding]:
    if not tokenizer.chat_template:
        yield Finding(
            NAME, "warning", "there is no chat template",
            "without one, a chat model continues plain text instead of answering; a base model is meant to",
            "put chat_template.jinja or tokenizer_config.json of the original model next to the weights; with a base model, "
            "use `dso run --raw`", facts,
        )  # fmt: skip
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program and can raise anything
        yield Finding(
            NAME, "error", "the chat template fails on a single question", f"{type(error).__name__}: {error}",
            "download the original model's template again", facts,
        )  # fmt: skip


def _end(tokenizer: Any, eos_ids: set[int], facts: dict[str, Any]) -> Iterator[Finding]:
    own = tokenizer.eos_token_id
    if not eos_ids:
        yield Finding(
            NAME, "warning", "generation has no end-of-sequence token, so every answer runs to its length limit",
            "neither generation_config.json nor config.json names an eos_token_id",
            f'set "eos_token_id": {own if own is not None else "the token id"} in generation_config.json', facts,
        )  # fmt: skip
    elif own is not None and own not in eos_ids:
        yield Finding(
            NAME, "warning", f"the tokenizer ends turns with {tokenizer.eos_token!r} ({own}), where generation does not stop",
            f"generation stops at {sorted(eos_ids)} only",
            f'set "eos_token_id": {sorted({own, *eos_ids})} in generation_config.json',
            facts,
        )  # fmt: skip


def _ids(value: Any) -> set[int]:
    return set() if value is None else set(value) if isinstance(value, (list, tuple)) else {int(value)}
