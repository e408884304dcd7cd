"""The special tokens in a model's configs.

Transformers accepts ids outside the vocabulary (-1 is common for "none") with a warning, since such a model works: no text ends
at that token. This package does the same, with a note in the report. A value that is not an id at all is an error.
"""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError, shown

_FIELDS = ("eos_token_id", "bos_token_id", "pad_token_id")


def special_token_notes(model: Any) -> list[str]:
    """One line for each field of `model.generation_config` (or else `model.config`) with ids outside the vocabulary.

    Raises:
        ConfigError: a field is neither an id, nor a list of ids, nor None.
    """
    notes = []
    vocab = model.config.vocab_size
    for field in _FIELDS:
        holder, name = getattr(model, "generation_config", None), "generation_config"
        if getattr(holder, field, None) is None:
            holder, name = model.config, "config"
        value = getattr(holder, field, None)
        outside = [token for token in token_ids(f"{name}.{field}", value) if not 0 <= token < vocab]
        if outside:
            effect = ": no text ends there" if field == "eos_token_id" else ""
            notes.append(f"{name}.{field} contains {shown(outside)}, outside the vocabulary of {vocab} tokens{effect}")
    return notes


def token_ids(field: str, value: Any) -> list[int]:
    """The token ids in a config's field, which may be None, an id or a list of ids.

    Raises:
        ConfigError: the value is something else; the message names `field`.
    """
    ids = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) or not -(1 << 63) <= token < 1 << 63 for token in ids):
        raise ConfigError(f"{field}: expected a token id, a list of token ids or null, got {shown(value)}")
    return ids
