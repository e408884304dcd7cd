"""The options of a server's model, which are known before anything is imported that takes long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ServedModel:
    """The model of a server, before it is loaded.

    Attributes:
        model: path or name of the checkpoint.
        name: by which requests name it; None: the path's last part.
        template: Jinja source of a chat template that replaces the checkpoint's.
        config: fields of `DeepSeekConfig`, and `device` of `load_model`.
        engine: options of `make_async_engine`.
        generation_config: where sampling parameters that a request omits come from, see `sampling_defaults`.
        pooling: how token vectors become an embedding; None: as the checkpoint says.
        draft_model: path or name of a model that drafts for this one.
        draft_precision: weight format of the draft model; without `draft_model`, the model drafts for itself in this format.
    """

    model: str
    name: str | None = None
    template: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    generation_config: str = "model"
    pooling: str | None = None
    draft_model: str | None = None
    draft_precision: str | None = None
