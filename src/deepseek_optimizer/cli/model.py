"""Loading for the commands, and how quiet they are about it."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import typer


def quiet() -> None:
    """Leaves stderr to our own lines; set before torch and Transformers load, which read these once."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def load(model: str, fields: dict[str, Any]) -> tuple[Any, Any]:
    """The optimised model and its tokenizer. Every problem with either is an error that `app.Commands` prints."""
    from .. import load_model, load_tokenizer

    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # Transformers' and the hub's; ours look at the stream themselves
    tokenizer = load_tokenizer(model)
    return load_model(model, **fields), tokenizer


def print_json(value: dict[str, Any]) -> None:
    """One object on one line of stdout, with the text as it is."""
    typer.echo(json.dumps(value, ensure_ascii=False))
