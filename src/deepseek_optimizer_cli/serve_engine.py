"""The engine of a server, for `dso serve` and `dso batch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from deepseek_optimizer.server.settings import ServerSettings


def check_options(tool_format: str | None, generation_config: str, name: str | None) -> None:
    """Raises a ConfigError if one of these options of a command has no valid value; before a model is loaded."""
    from deepseek_optimizer.chat.sampling_defaults import SOURCES
    from deepseek_optimizer.chat.tools import FORMATS
    from deepseek_optimizer.errors import ConfigError

    if tool_format is not None and tool_format not in FORMATS:
        raise ConfigError(f"--tool-format must be one of {', '.join(FORMATS)}, got {tool_format!r}")
    if generation_config not in SOURCES:
        raise ConfigError(f"--generation-config must be one of {', '.join(SOURCES)}, got {generation_config!r}")
    if name is not None and not name.strip():
        raise ConfigError("--served-model-name must not be empty")


def load_engine(
    model: str,
    name: str | None,
    template: str | None,
    fields: dict[str, Any],
    settings: ServerSettings,
    generation_config: Any,
    options: dict[str, Any],
    pooling: str | None,
    drafting: tuple[str | None, str | None],
) -> tuple[Any, ServerSettings, int, Any]:
    """The engine of a model, its settings, the memory that it may take in bytes, and its report."""
    from dataclasses import replace

    from deepseek_optimizer import report
    from deepseek_optimizer.chat.sampling_defaults import SamplingDefaults, sampling_defaults
    from deepseek_optimizer.checkpoint.sentence_transformers import read_embedding_settings
    from deepseek_optimizer.errors import ConfigError
    from deepseek_optimizer.integration.encoder.text_encoder import is_encoder_runtime
    from deepseek_optimizer.integration.load.resolve import resolve
    from deepseek_optimizer.serving import make_async_engine

    from .model import load, load_draft_model, picture_encoder

    loaded, tokenizer = load(model, dict(fields), template)
    embedding = read_embedding_settings(resolve(model))
    if embedding.chat_template and embedding.score_tokens is None:
        typer.echo("dso: texts are embedded without the chat template that sentence-transformers applies to them", err=True)
    if pooling is not None:
        embedding = replace(embedding, pooling=(pooling,))
    encoder = is_encoder_runtime(loaded.dso)
    if encoder and drafting != (None, None):
        raise ConfigError("--draft-model and --draft-precision: encoders generate no text; leave them out")
    if encoder:
        options = {**options, "max_tokens": embedding.max_tokens}
    defaults = SamplingDefaults() if encoder else sampling_defaults(loaded, model, generation_config)
    settings = replace(
        settings,
        sampling=defaults.values,
        sampling_not_thinking=defaults.not_thinking,
        embedding=embedding,
        model_path=model,
    )
    pictures = picture_encoder(loaded, model, needed=False)
    draft_model = load_draft_model(model, *drafting, fields)
    engine: Any = make_async_engine(loaded, tokenizer, model_name=name, pictures=pictures, draft_model=draft_model, **options)
    facts = report(loaded)
    return engine, settings, facts.bytes_after + (0 if encoder else engine.core.memory.size.bytes), facts
