"""The calibration text: a user's file, or Python's own documentation, as stretches of token ids."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError

LENGTH, COUNT = 512, 32  # tokens per stretch, maximum number of stretches: column statistics are stable after 16,000 tokens
MAX_BYTES = 64 << 20  # far more than calibration uses; a larger file is a mistake and would take minutes to tokenize


def sample_text() -> str:
    """Returns the default text: English prose and code from the documentation that every Python installation contains."""
    from pydoc_data.topics import topics  # half a megabyte

    return "\n".join(topics[name] for name in sorted(topics) if len(topics[name]) > 2000)


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads a UTF-8 text file.

    Raises:
        ConfigError: the file is missing, not a regular file, not UTF-8, or larger than 64 MB; names the file.
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
    """Tokenizes a text and returns stretches of it, evenly spread over the text: token ids, int64 [1, length] each.

    Args:
        tokenizer: a Transformers tokenizer.
        text: the text.
        length: tokens per stretch.
        count: maximum number of stretches.
        source: name of the text in errors, such as the file's name.

    Raises:
        ConfigError: the text is shorter than one stretch.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64, device="cpu")
    whole = len(ids) // length
    if whole == 0:
        raise ConfigError(f"calibration: {source} has {len(ids)} tokens, too few for calibration; use at least {length}")
    chosen = range(whole) if whole <= count else [i * whole // count for i in range(count)]
    return [ids[None, i * length : (i + 1) * length] for i in chosen]
