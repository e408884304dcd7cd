"""The calibration text: a user's file, or one that every Python ships, as stretches of token ids."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError

LENGTH, COUNT = 512, 32  # tokens of a stretch, and how many at most: column statistics hardly move after 16,000 tokens
MAX_BYTES = 64 << 20  # far more than calibration reads; a larger file is a mistake that would take minutes to tokenise


def sample_text() -> str:
    """English prose and code that every Python ships, for who has no text of their own: its own documentation."""
    from pydoc_data.topics import topics  # half a megabyte

    return "\n".join(topics[name] for name in sorted(topics) if len(topics[name]) > 2000)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file.

    Raises:
        ConfigError: the file is missing, no file, not UTF-8, or larger than 64 MB. It names the file.
    """
    file = Path(path)
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"calibration: {file} is larger than {MAX_BYTES >> 20} MB; a few pages of typical text are enough"
            )
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"calibration: {file} is not UTF-8 text (byte {error.start}); convert it, or name a text file"
        ) from error
    except OSError as error:
        raise ConfigError(f"calibration: {file} cannot be read: {error.strerror or error}") from error


def stretches(
    tokenizer: Any, text: str, length: int = LENGTH, count: int = COUNT, source: str = "the text"
) -> list[torch.Tensor]:
    """At most `count` stretches of `length` tokens, spread evenly over the text: ids int64 [1, length] each.

    Raises:
        ConfigError: the text is shorter than one stretch. It calls the text `source`: the file's name, where there is one.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64, device="cpu")
    whole = len(ids) // length
    if whole == 0:
        raise ConfigError(f"calibration: {source} has {len(ids)} tokens, too few to measure by; give at least {length}")
    chosen = range(whole) if whole <= count else [i * whole // count for i in range(count)]
    return [ids[None, i * length : (i + 1) * length] for i in chosen]
