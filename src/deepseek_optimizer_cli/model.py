"""Model loading for the commands, and the output they suppress."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer


def quiet() -> None:
    """Keeps other libraries' output off stderr; our own warnings are printed as one line each.

    Call it before torch and Transformers are imported: they read these variables once.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = _show_ours


def _show_ours(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
    if category.__module__.startswith("deepseek_optimizer."):
        typer.echo(f"dso: {message}", err=True)


def no_bars_in_pipes() -> None:
    """Disables Transformers' progress bars when stderr is not a terminal; our own bars check that themselves."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def load(model: str, fields: dict[str, Any], template: str | None = None) -> tuple[Any, Any]:
    """The optimized model and its tokenizer, see `chat.loading.load`. `app.Commands` prints its errors as one line."""
    from deepseek_optimizer.chat import loading

    no_bars_in_pipes()
    loaded, tokenizer = loading.load(model, fields, template)
    if loaded.dso.profile_note is not None:
        warn(loaded.dso.profile_note)
    return loaded, tokenizer


def load_draft_model(model: str, draft_model: str | None, precision: str | None, fields: dict[str, Any]) -> Any:
    """The optimized model that drafts for another, see `chat.loading.load_draft_model`."""
    from deepseek_optimizer.chat import loading

    return loading.load_draft_model(model, draft_model, precision, fields)


def picture_encoder(loaded: Any, model: str, *, needed: bool) -> Any:
    """What makes prompts with pictures for a loaded model, see `chat.loading.picture_encoder`; warnings go to stderr."""
    from deepseek_optimizer.chat import loading

    return loading.picture_encoder(loaded, model, None if needed else warn)


def warn(message: str) -> None:
    """Prints a warning as one line on stderr."""
    typer.echo(f"dso: {message}", err=True)


@contextmanager
def ocr_model(model: str | None) -> Iterator[Any]:
    """An `OcrModel` that has been loaded, for the context; None if no model is named.

    Args:
        model: path or name of a model that sees.

    Raises:
        ConfigError, MissingPackageError: see `OcrModel.load`.
    """
    if model is None:
        yield None
        return
    from deepseek_optimizer.longdoc.ocr_model import OcrModel

    no_bars_in_pipes()
    with OcrModel(model, batch_size_range=(1, 1)) as reader:
        reader.load()
        yield reader


def print_json(value: dict[str, Any]) -> None:
    """Prints one JSON object as one line on stdout, non-ASCII text unescaped."""
    typer.echo(json.dumps(value, ensure_ascii=False))
