"""What the doctor examines: a machine, and optionally a model with the settings to run it with."""

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
    machine: the machine to examine.
    model: directory, .gguf file or hub name; None: examine the machine only.
    fields: fields of `DeepSeekConfig` to load the model with.
    context: sequence length to check memory for; None: the length the model was trained on.
    batch: number of concurrent sequences to check memory for.

    Use it in a `with` statement: it keeps the model's files open.
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
        """The opened checkpoint. Raises CheckpointError if it is damaged, ConfigError without a model."""
        from ..checkpoint import open_checkpoint
        from ..integration.load.resolve import resolve

        if self.model is None:
            raise ConfigError("this check needs a model: give a directory, a .gguf file or a name on the Hugging Face Hub")
        return self._open.enter_context(open_checkpoint(resolve(self.model)))

    @cached_property
    def _sketch(self) -> tuple[Any, Any]:
        from ..integration.load.loader import sketch

        return sketch(self.checkpoint, None, self.fields)[:2]

    @property
    def sketch(self) -> Any:
        """The model as it would be loaded, without weights."""
        return self._sketch[0]

    @property
    def settings(self) -> Any:
        """The `DeepSeekConfig` that the model would be loaded with."""
        return self._sketch[1]

    @cached_property
    def graph(self) -> Any:
        """The model's graph, with the fusion rules and the attention mode of the settings."""
        from ..graph.cache_groups import cached_in
        from ..integration.bind.graphs import loaded_mtp_layers, plan_graph

        settings, layers = self.settings, loaded_mtp_layers(self.sketch)
        graph, _ = plan_graph(self.sketch.config, settings.rules, layers, settings.attention)
        return cached_in(graph, settings.kv_cache)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises CheckpointError if there is none that matches the weights."""
        from ..checkpoint import load_tokenizer

        return load_tokenizer(self.checkpoint)

    @cached_property
    def generation_config(self) -> Any:
        """The generation config beside the weights, or Transformers' defaults."""
        from transformers import GenerationConfig

        folder = self.checkpoint.path
        if (folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(str(folder))
        return GenerationConfig.from_model_config(self.sketch.config)

    def with_fields(self, **fields: Any) -> Case:
        """The same model with other config fields, which must not affect the weights. It shares the open files: close this
        case, not the new one."""
        twin = replace(self, fields={**self.fields, **fields}, _open=ExitStack())
        settings = copy.copy(self.settings)
        for name, value in fields.items():
            setattr(settings, name, value)
        twin.__dict__.update(checkpoint=self.checkpoint, _sketch=(self.sketch, settings))
        return twin

    def load(self, **fields: Any) -> Any:
        """Loads the optimized model; `fields` override those of the case. Of a multimodal checkpoint that is the language
        model."""
        from ..integration.multimodal import language_model_of
        from ..optimized_model import load_model

        alone = {} if self.checkpoint.whole is None else {"vision": "off"}
        return language_model_of(load_model(self.checkpoint.path, **{**alone, **self.fields, **fields}))

    @cached_property
    def loaded(self) -> Any:
        """The optimized model with the settings of the case."""
        return self.load()
