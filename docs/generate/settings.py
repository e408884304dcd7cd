"""`reference/config.md`: every settings class, from its fields and its docstring."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from .markdown import parse, plain, table

INTRODUCTION = """\
# Settings

This page is generated from the code by `python -m docs.generate`. Every value is checked when it is set; an unknown name or a
value that is not allowed raises [`ConfigError`](api.md#errors), which names the field.
[Quantize a model](../how-to/quantize.md) shows what the formats of weights and of the KV cache cost in quality.

| class | used by |
|---|---|
| [`DeepSeekConfig`](#deepseekconfig) | `load_model`, `from_pretrained(quantization_config=...)`, `DynamicGraphOptimizer` |
| [`SamplingParams`](#samplingparams) | `Engine.generate`, `Request`, `LongDocument` |
| [`EngineOptions`](#engineoptions) | keyword arguments of `make_engine` and `make_async_engine` |
| [`ServerSettings`](#serversettings) | `dso serve` |
| [`TrainConfig`](#trainconfig) | the YAML or JSON file of `dso train` |
| [`DeepSeekTrainingArguments`](#deepseektrainingarguments) | `DeepSeekTrainer`, and `arguments` in `TrainConfig` |
"""

_OMITTED = ("typing.", "collections.abc.", "pathlib._local.", "pathlib.")  # Path's module depends on the release of Python


def page() -> str:
    from deepseek_optimizer import DeepSeekConfig, DeepSeekTrainingArguments, SamplingParams
    from deepseek_optimizer.engine.options import EngineOptions
    from deepseek_optimizer.server.settings import ServerSettings
    from deepseek_optimizer.train.config import DataSection, LoraSection, TrainConfig
    from deepseek_optimizer.train.data.load import DataOptions

    return "\n\n".join(
        [
            INTRODUCTION.rstrip(),
            section(DeepSeekConfig),
            section(SamplingParams),
            section(EngineOptions),
            section(ServerSettings),
            section(TrainConfig),
            section(DataSection, level=3, more=descriptions(DataOptions)),
            section(LoraSection, level=3),
            section(DeepSeekTrainingArguments, only=DeepSeekTrainingArguments.__annotations__),
        ]
    )


def section(cls: Any, level: int = 2, only: Any = None, more: Mapping[str, str] | None = None) -> str:
    """Heading, introduction and fields of a dataclass or a pydantic model.

    Args:
        only: names of the fields to list; None: all.
        more: descriptions for fields that the docstring leaves out.
    """
    documented = parse(cls.__doc__)
    rows = []
    for name, hint, default in fields_of(cls):
        if (only is None or name in only) and not name.startswith("_"):
            text = documented.of(name) or (more or {}).get(name, "")
            if not text or text.endswith("not for users."):
                continue
            rows.append((f"`{name}`", annotation(hint), f"`{default}`" if default else "required", plain(text)))
    text = [f"{'#' * level} {cls.__name__}", plain(documented.text) if documented.text else ""]
    return "\n\n".join(part for part in [*text, table(("field", "type", "default", "meaning"), rows)] if part)


def descriptions(cls: Any) -> dict[str, str]:
    documented = parse(cls.__doc__)
    return {name: text for names, text in documented.entries for name in names.split(", ")}


def fields_of(cls: Any) -> Iterator[tuple[str, Any, str]]:
    """Name, type and default (as Python writes it; "" where the field is required) of each field."""
    hints = typing.get_type_hints(cls)
    if dataclasses.is_dataclass(cls):
        for field in dataclasses.fields(cls):
            yield field.name, hints[field.name], _default(field)
    else:
        for name, field in cls.model_fields.items():
            required = field.is_required()
            yield name, hints[name], "" if required else repr(field.get_default(call_default_factory=True))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return repr(made) if isinstance(made, (dict, list, tuple, str, int, float)) else f"{type(made).__name__}()"
    return ""


def annotation(hint: Any) -> str:
    """A type as a reader writes it: a Literal by its values, a union by its members."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{value!r}`" for value in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return ", ".join(annotation(member) for member in typing.get_args(hint))
    if hint is type(None):
        return "`None`"
    text = inspect.formatannotation(hint)
    for module in _OMITTED:
        text = text.replace(module, "")
    return f"`{text}`"
