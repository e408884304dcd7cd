"""Whom the doctor examines: a machine, and a model with the settings it is meant to run with."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..errors import ConfigError
from .machine import Machine


@dataclass
class Case:
    """Attributes:
    machine: what it runs on.
    model: a directory, a .gguf file or a hub name; None: the machine alone.
    fields: fields of `DeepSeekConfig` that the model is meant to be loaded with.
    context: tokens of a sequence to make room for; None: what the model was trained on.
    batch: sequences at once.

    Close it, or use it in a `with` statement: the model's files stay open meanwhile.
    """

    machine: Machine = field(default_factory=Machine.here)
    model: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    context: int | None = None
    batch: int = 1
    _open: ExitStack = field(default_factory=ExitStack, repr=False)

    def __enter__(self) -> Case:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    @cached_property
    def checkpoint(self) -> Any:
        """The opened checkpoint. Raises CheckpointError where it is damaged."""
        from ..checkpoint import open_checkpoint
        from ..integration.load.resolve import resolve

        if self.model is None:
            raise ConfigError("this needs a model: name a directory, a .gguf file or a hub name")
        return self._open.enter_context(open_checkpoint(resolve(self.model)))

    @cached_property
    def _sketch(self) -> tuple[Any, Any]:
        from ..integration.load.loader import sketch

        return sketch(self.checkpoint, None, self.fields)[:2]

    @property
    def sketch(self) -> Any:
        """The model as it would be loaded, without its weights."""
        return self._sketch[0]

    @property
    def settings(self) -> Any:
        """The `DeepSeekConfig` of the load."""
        return self._sketch[1]

    @cached_property
    def graph(self) -> Any:
        """The model's graph, with the rules and the attention that the settings ask for."""
        from ..integration.bind.graphs import loaded_mtp_layers, plan_graph

        settings, layers = self.settings, loaded_mtp_layers(self.sketch)
        return plan_graph(self.sketch.config, settings.rules, layers, settings.attention)[0]

    @cached_property
    def tokenizer(self) -> Any:
        """Raises CheckpointError where there is none that fits."""
        from ..checkpoint import load_tokenizer

        return load_tokenizer(self.checkpoint)

    @cached_property
    def generation_config(self) -> Any:
        """Transformers' generation settings that lie with the weights, or its defaults."""
        from transformers import GenerationConfig

        folder = self.checkpoint.path
        if (folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(str(folder))
        return GenerationConfig.from_model_config(self.sketch.config)

    def with_fields(self, **fields: Any) -> Case:
        """The same model with other fields of its config, such as change nothing of its weights. Shares the open files: close
        this one."""
        twin = replace(self, fields={**self.fields, **fields}, _open=ExitStack())
        settings = copy.copy(self.settings)
        for name, value in fields.items():
            setattr(settings, name, value)
        twin.__dict__.update(checkpoint=self.checkpoint, _sketch=(self.sketch, settings))
        return twin

    def load(self, **fields: Any) -> Any:
        """The optimised model, with `fields` over those of the case."""
        from ..optimizer import load_model

        return load_model(self.checkpoint.path, **{**self.fields, **fields})

    @cached_property
    def loaded(self) -> Any:
        """The model with the case's own settings."""
        return self.load()
