"""`reference/api.md`: every public name of the package, with signature and docstring."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from .markdown import Docstring, parse, plain, raises, table

INTRODUCTION = """\
# Python API

This page is generated from the code by `python -m docs.generate`. Import these names from `deepseek_optimizer`;
other modules may change without notice.
"""
ON_CONFIG_PAGE = ("DeepSeekConfig", "SamplingParams", "DeepSeekTrainingArguments")
FUNCTIONS_FIRST = ("load_model", "load_tokenizer", "DynamicGraphOptimizer", "report", "make_engine", "make_async_engine")


def page() -> str:
    import deepseek_optimizer as package

    names = [name for name in package.__all__ if getattr(package, name).__name__ == name]
    values = {name: getattr(package, name) for name in (*FUNCTIONS_FIRST, *(n for n in names if n not in FUNCTIONS_FIRST))}
    text = [INTRODUCTION.rstrip()]
    text += [entry(name, value) for name, value in values.items() if not _is_error(value)]
    text += [engine(), encode(), errors_section()]
    return "\n\n".join(text)


def engine() -> str:
    from deepseek_optimizer.engine.engine import Engine

    return entry("Engine", Engine, "What `make_engine` returns.")


def encode() -> str:
    from deepseek_optimizer.integration.encoder import EncoderRuntime

    return entry(
        "model.dso.encode", EncoderRuntime.encode, "Of a model that is an encoder, see [Encoders](../models.md#encoders)."
    )


def entry(name: str, value: Any, note: str = "", level: int = 2) -> str:
    heading = f"{'#' * level} {name}"
    if name in ON_CONFIG_PAGE:
        return f"{heading}\n\nSee [Settings](config.md#{name.lower()})."
    documented = parse(value.__doc__ if not _generated(value) else "")
    parts = [heading, note, signature(name.rpartition(".")[2], value), body(documented)]
    if isinstance(value, type):
        parts += [entry(f"{name}.{child}", member, level=level + 1) for child, member in _methods(value)]
    return "\n\n".join(part for part in parts if part)


def signature(name: str, value: Any) -> str:
    """The signature as in the source; "" for properties."""
    if isinstance(value, property):
        return ""
    whole = inspect.signature(getattr(value, "__func__", value))
    kept = [_plain(p) for p in whole.parameters.values() if isinstance(value, type) or p.name not in ("self", "cls")]
    returned = inspect.Signature.empty if isinstance(value, type) else _Source.of(whole.return_annotation)
    text = f"{name}{whole.replace(parameters=kept, return_annotation=returned)}"
    if len(text) > 100:
        arguments = [str(p) for p in kept]
        keywords = [i for i, p in enumerate(kept) if p.kind is p.KEYWORD_ONLY]
        if keywords and not any(p.kind is p.VAR_POSITIONAL for p in kept):
            arguments.insert(keywords[0], "*")
        ending = text.rpartition(")")[2]
        text = f"{name}(\n    " + ",\n    ".join(arguments) + f",\n){ending}"
    return f"```text\n{text}\n```"


class _Source(str):
    """Source text that `repr` shows without quotes."""

    __slots__ = ()
    __repr__ = str.__str__

    @classmethod
    def of(cls, annotation: Any) -> Any:
        return cls(annotation) if isinstance(annotation, str) else annotation


def _plain(parameter: inspect.Parameter) -> inspect.Parameter:
    """A parameter whose annotation and default are shown as in the source."""
    default = parameter.default
    if isinstance(default, type) and default is not inspect.Parameter.empty:
        default = _Source(f"{default.__module__}.{default.__name__}")
    elif str(default) == "<factory>":  # of a dataclass
        default = _Source("...")
    return parameter.replace(annotation=_Source.of(parameter.annotation), default=default)


def body(documented: Docstring) -> str:
    parts = [plain(documented.text)]
    if documented.entries:
        rows = [(", ".join(f"`{n}`" for n in names.split(", ")) if names else "", plain(t)) for names, t in documented.entries]
        parts.append(table(("name", "meaning"), rows))
    if documented.returns:
        parts.append(f"**Returns** {plain(documented.returns)}")
    if documented.raises:
        parts.append(f"**Raises**\n\n{raises(documented)}")
    return "\n\n".join(part for part in parts if part)


def errors_section() -> str:
    from deepseek_optimizer import errors

    rows = []
    for name, value in vars(errors).items():
        if not (isinstance(value, type) and issubclass(value, errors.DeepSeekOptimizerError)):
            continue
        bases = ", ".join(f"`{base.__name__}`" for base in value.__bases__)
        rows.append((f"`{name}`", bases, plain(parse(value.__doc__).text.split("\n\n")[0])))
    intro = (
        "The errors that the package raises deliberately; import them from `deepseek_optimizer.errors`. Each message says "
        "what is wrong, where, and what to do."
    )
    return f"## Errors\n\n{intro}\n\n{table(('error', 'base classes', 'meaning'), rows)}"


def _methods(cls: type) -> list[tuple[str, Any]]:
    """Public methods and properties, including classmethods, that the class itself defines and documents."""
    found = []
    for name, member in vars(cls).items():
        inner = getattr(member, "__func__", member)
        public = not name.startswith("_") and (inspect.isfunction(inner) or isinstance(member, property))
        if public and member.__doc__:
            found.append((name, member))
    return found


def _is_error(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def _generated(value: Any) -> bool:
    """Whether the docstring is the one that `dataclass` generates, the signature."""
    return dataclasses.is_dataclass(value) and str(value.__doc__).startswith(f"{value.__name__}(")
