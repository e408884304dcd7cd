"""Loading for the commands, and how quiet they are about it."""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

import typer


def quiet() -> None:
    """Leaves stderr to our own lines, one a warning; set before torch and Transformers load, which read these once."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = _show_ours


def _show_ours(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
    if category.__module__.startswith("deepseek_optimizer."):
        typer.echo(f"dso: {message}", err=True)


def no_bars_in_pipes() -> None:
    """Turns Transformers' progress bars off where nobody watches; ours look at the stream themselves."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def load(model: str, fields: dict[str, Any]) -> tuple[Any, Any]:
    """The optimised model and its tokenizer. Every problem with either is an error that `app.Commands` prints."""
    from deepseek_optimizer import load_model, load_tokenizer

    no_bars_in_pipes()
    tokenizer = load_tokenizer(model)
    return load_model(model, **fields), tokenizer


def print_json(value: dict[str, Any]) -> None:
    """One object on one line of stdout, with the text as it is."""
    typer.echo(json.dumps(value, ensure_ascii=False))
