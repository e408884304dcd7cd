"""The special tokens that a model's configs name.

Transformers takes an id that is no token (-1 is common for "none") and only warns, since such a model works: nothing ever ends
at that token. So does this package, and says it in the report. What is no id at all is an error.
"""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError, shown

_FIELDS = ("eos_token_id", "bos_token_id", "pad_token_id")


def special_token_notes(model: Any) -> list[str]:
    """What is odd about the ids of `model.generation_config`, or of `model.config` where that has none.

    Raises:
        ConfigError: a field is neither an id, a list of them nor None.
    """
    notes = []
    vocab = model.config.vocab_size
    for field in _FIELDS:
        holder, name = getattr(model, "generation_config", None), "generation_config"
        if getattr(holder, field, None) is None:
            holder, name = model.config, "config"
        value = getattr(holder, field, None)
        strange = [token for token in token_ids(f"{name}.{field}", value) if not 0 <= token < vocab]
        if strange:
            ends = ": no text ends there" if field == "eos_token_id" else ""
            notes.append(f"{name}.{field} names {shown(strange)}, which the vocabulary of {vocab} tokens does not have{ends}")
    return notes


def token_ids(field: str, value: Any) -> list[int]:
    """The ids that a config's field holds: none, one or a list of them.

    Raises:
        ConfigError: it holds something else; the message names `field`.
    """
    ids = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) or not -(1 << 63) <= token < 1 << 63 for token in ids):
        raise ConfigError(f"{field}: expected a token's id, a list of them or nothing, got {shown(value)}")
    return ids
