"""Loads the model of a server: its engine, and the settings that its checkpoint decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from ..chat.loading import load, load_draft_model, picture_encoder
from ..chat.sampling_defaults import SamplingDefaults, sampling_defaults
from ..checkpoint.sentence_transformers import read_embedding_settings
from ..engine.async_engine import AsyncEngine
from ..errors import ConfigError
from ..integration.encoder.text_encoder import is_encoder_runtime
from ..integration.load.resolve import resolve
from ..optimized_model import report
from ..serving import make_async_engine
from .served_model import ServedModel
from .settings import ServerSettings


class LoadedModel(NamedTuple):
    """A model of a server that has been loaded.

    Attributes:
        engine: not started.
        settings: the server's.
        memory: that weights and cache may take, in bytes.
        report: see `report`.
    """

    engine: AsyncEngine
    settings: ServerSettings
    memory: int
    report: Any


def load_served_model(served: ServedModel, settings: ServerSettings, warn: Callable[[str], None]) -> LoadedModel:
    """Loads the model of a server.

    Args:
        served: the model.
        settings: the server's; those that the checkpoint decides are replaced.
        warn: called with a message about each thing that does not work as one may expect.

    Raises:
        ConfigError: an option is invalid, or has no effect for this model.
        DeepSeekOptimizerError: see `load_model`, `make_async_engine`.
    """
    fields, options = dict(served.config), dict(served.engine)
    loaded, tokenizer = load(served.model, fields, served.template)
    if loaded.dso.profile_note is not None:
        warn(loaded.dso.profile_note)
    embedding = read_embedding_settings(resolve(served.model))
    if embedding.chat_template and embedding.score_tokens is None:
        warn("texts are embedded without the chat template that sentence-transformers applies to them")
    if served.pooling is not None:
        embedding = replace(embedding, pooling=(served.pooling,))
    encoder = is_encoder_runtime(loaded.dso)
    drafting = (served.draft_model, served.draft_precision)
    if encoder and drafting != (None, None):
        raise ConfigError("--draft-model and --draft-precision: encoders generate no text; leave them out")
    if encoder:
        options["max_tokens"] = embedding.max_tokens
    defaults = (
        SamplingDefaults() if encoder else sampling_defaults(loaded, served.model, served.generation_config)  # type: ignore[arg-type]  # checked there
    )
    settings = replace(
        settings,
        sampling=defaults.values,
        sampling_not_thinking=defaults.not_thinking,
        embedding=embedding,
        model_path=served.model,
    )
    pictures = picture_encoder(loaded, served.model, warn)
    draft_model = load_draft_model(served.model, *drafting, fields)
    engine: Any = make_async_engine(
        loaded, tokenizer, model_name=served.name, pictures=pictures, draft_model=draft_model, **options
    )
    facts = report(loaded)
    return LoadedModel(engine, settings, facts.bytes_after + (0 if encoder else engine.core.memory.size.bytes), facts)
