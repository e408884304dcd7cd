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
    """The optimized model and its tokenizer. Raises errors that `app.Commands` prints as one line.

    Args:
        model: path or name of the checkpoint.
        fields: of `DeepSeekConfig`, and `device` of `load_model`.
        template: Jinja source of a chat template that replaces the checkpoint's.
    """
    from deepseek_optimizer import load_model, load_tokenizer

    no_bars_in_pipes()
    tokenizer = load_tokenizer(model)
    if template is not None:
        from deepseek_optimizer.chat.named_template import use_template

        use_template(tokenizer, template)
    loaded = load_model(model, **fields)
    if loaded.dso.profile_note is not None:
        typer.echo(f"dso: {loaded.dso.profile_note}", err=True)
    return loaded, tokenizer


def load_draft_model(model: str, draft_model: str | None, precision: str | None, fields: dict[str, Any]) -> Any:
    """The optimized model that drafts for another, for `make_engine(draft_model=...)`; None if neither option is given.

    Args:
        model: path or name of the model that it drafts for, which drafts itself if only a precision is given.
        draft_model, precision: the options `--draft-model` and `--draft-precision`.
        fields: of the model's `DeepSeekConfig`; the draft model uses as many threads and sequences, and the same device.
    """
    if draft_model is None and precision is None:
        return None
    from deepseek_optimizer import load_model

    common = ("threads", "batch_size_range", "prefill_chunk", "device")
    shared: dict[str, Any] = {name: fields[name] for name in common if name in fields}
    if precision is not None:
        shared["precision"] = precision
    return load_model(draft_model or model, mtp="off", vision="off", **shared)


def picture_encoder(loaded: Any, model: str, *, needed: bool) -> Any:
    """What makes prompts with pictures for a loaded model; None: it reads text only.

    Args:
        loaded, model: the model, and its path or name.
        needed: raise an error if it reads text only, or if a library is missing; otherwise the latter is a warning.

    Raises:
        ConfigError, MissingPackageError: see above.
    """
    from deepseek_optimizer.chat.pictures import load_processor
    from deepseek_optimizer.errors import ConfigError, MissingPackageError
    from deepseek_optimizer.integration.multimodal import PictureEncoder, is_multimodal

    if not is_multimodal(loaded):
        if needed:
            raise ConfigError(f"{model}: this model reads text only")
        return None
    try:
        return PictureEncoder(loaded, load_processor(model))
    except (ConfigError, MissingPackageError) as error:
        if needed:
            raise
        typer.echo(f"dso: {error}; the model reads text only", err=True)
        return None


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
