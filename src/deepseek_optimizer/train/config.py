"""The configuration of `dso train`, from a YAML or JSON file and flags, validated before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from ..errors import ConfigError, MissingPackageError
from .arguments import DeepSeekTrainingArguments
from .data.load import DataOptions, TooLong

try:
    from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator
    from pydantic.errors import PydanticUserError
except ImportError:
    raise MissingPackageError("a training configuration", "pydantic", "train") from None

_SET_ELSEWHERE: Final = {
    "output_dir": "output", "packing": "data.packing", "resume_from_checkpoint": "--resume", "do_train": "the command",
    "do_eval": "data.eval or data.eval_fraction", "do_predict": "the command",
}  # fmt: skip


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(_Section):
    """The data, and how it is split into sequences; see `data.load.DataOptions`.

    Attributes:
        train: files and directories of training data.
        eval: files and directories of evaluation data.
        eval_fraction: fraction of the training data to hold out for evaluation.
        packing: pack several documents into a row; they do not attend to each other.
    """

    train: tuple[str, ...] = Field(min_length=1)
    eval: tuple[str, ...] = ()
    eval_fraction: float = Field(0.0, ge=0, lt=1)
    max_length: int | None = Field(None, ge=2)
    assistant_only: bool = True
    per_answer: bool = False
    too_long: TooLong = "error"
    skip_bad_lines: bool = False
    packing: bool = True

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if self.eval and self.eval_fraction:
            raise ValueError("eval and eval_fraction both define the evaluation data; set only one of them")
        return self

    @property
    def options(self) -> DataOptions:
        return DataOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(DataOptions)})


class LoraSection(_Section):
    """A low-rank adapter (LoRA, arXiv 2106.09685); the model's own weights are frozen.

    Attributes:
        r: rank of the adapter.
        alpha: the adapter is scaled by alpha / r; None: 2 r.
        dropout: probability of dropping an input of the adapter.
        targets: names of the linear layers to adapt; "auto": all those of attention, and of MLPs if
            the model has no routed experts.
    """

    r: int = Field(16, ge=1, le=1024)
    alpha: float | None = Field(None, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["auto"] | tuple[str, ...] = "auto"


class TrainConfig(_Section):
    """The configuration of a training run.

    Attributes:
        model: a directory or a model name on the Hugging Face Hub; with `lora` also a packed or GGUF checkpoint.
        output: the directory to create, for checkpoints, loss curve and result.
        data: see `DataSection`; a path or a list of paths stands for `data.train`.
        lora: train an adapter; see `LoraSection`. An integer is its rank. None: train all weights.
        precision: with `lora`, the format of the frozen weights; None: bf16 or fp32, by `arguments.bf16`.
        merge: with `lora`, save the whole model with the adapter merged into it.
        patience: number of evaluations without a lower loss after which training stops; None: no limit.
        arguments: fields of `DeepSeekTrainingArguments`, by name.
        cache: directory for tokenized data; None: the user's cache directory.
    """

    model: str = Field(min_length=1)
    output: str = Field(min_length=1)
    data: DataSection
    lora: LoraSection | None = None
    precision: Literal["int3", "int4", "q4_1", "int8", "fp8"] | None = None
    merge: bool = False
    patience: int | None = Field(None, ge=1)
    arguments: dict[str, Any] = Field(default_factory=dict)
    cache: str | None = None

    @field_validator("data", mode="before")
    @classmethod
    def _data(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, (str, list, tuple)) else value

    @field_validator("lora", mode="before")
    @classmethod
    def _lora(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return {} if value else None
        return {"r": value} if isinstance(value, int) else value

    @field_validator("arguments", mode="after")
    @classmethod
    def _arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        return checked_arguments(value)

    @model_validator(mode="after")
    def _agree(self) -> TrainConfig:
        if self.lora is None and self.precision is not None:
            raise ValueError(f"precision={self.precision!r} freezes the weights, so it needs lora")
        if self.lora is not None and self.arguments.get("quantize") is not None:
            raise ValueError("arguments.quantize trains all weights, so it cannot be combined with lora; leave lora out, or "
                             "set precision instead of quantize to train an adapter on quantized weights")  # fmt: skip
        if self.lora is None and self.merge:
            raise ValueError("merge=True merges an adapter, so it needs lora; without lora the result is a whole model anyway")
        if self.patience is not None and not self.evaluates:
            raise ValueError("patience depends on the evaluation loss, so it needs data.eval or data.eval_fraction")
        return self

    @property
    def evaluates(self) -> bool:
        """Whether there is evaluation data."""
        return bool(self.data.eval or self.data.eval_fraction)


def checked_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments by name, converted to their types. Strings that contain numbers are accepted.

    Raises:
        ConfigError: an argument does not exist (the message suggests the nearest name), has a setting of its own in
            `TrainConfig`, or has the wrong type.
    """
    fields = {field.name for field in dataclasses.fields(DeepSeekTrainingArguments) if field.init}
    hints = typing.get_type_hints(DeepSeekTrainingArguments)
    out = {}
    for name, value in given.items():
        if name in _SET_ELSEWHERE:
            raise ConfigError(f"arguments.{name} cannot be set here; use {_SET_ELSEWHERE[name]}")
        if name not in fields:
            raise ConfigError(f"arguments has no field {name!r}; {_nearest(name, fields - _SET_ELSEWHERE.keys())}")
        try:
            out[name] = TypeAdapter(hints[name]).validate_python(value)
        except PydanticUserError:  # a type that pydantic does not support; Transformers validates it
            out[name] = value
        except ValidationError as error:
            raise ConfigError(f"arguments.{name}: {error.errors()[0]['msg']}, got {value!r}") from None
    return out


def make_config(given: Mapping[str, Any], source: str = "") -> TrainConfig:
    """Validates a training configuration.

    Args:
        given: fields of `TrainConfig`, by name.
        source: prefix for error messages, such as the file name.

    Raises:
        ConfigError: a field is missing, unknown (the message suggests the nearest name), or invalid.
    """
    try:
        return TrainConfig.model_validate(dict(given))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}" if source else str(error)) from None
    except ValidationError as error:
        messages = "; ".join(dict.fromkeys(map(_message, error.errors())))
        raise ConfigError(f"{source}: {messages}" if source else messages) from None


def read_config(path: str) -> dict[str, Any]:
    """Reads the fields of a YAML or JSON file, without validating them.

    Raises:
        ConfigError: the file cannot be read or is not a mapping.
        MissingPackageError: PyYAML is needed and not installed.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        value = json.loads(text) if file.suffix.lower() == ".json" else _yaml(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{path} must contain a mapping, such as `model: ...`, got {type(value).__name__}")
    return value


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise MissingPackageError("a YAML file", "pyyaml", "train") from None

    class Loader(yaml.SafeLoader):
        """Reads 1e-4 as a number, as in YAML 1.2; PyYAML follows YAML 1.1, where it is a string."""

    numbers = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", numbers, list("-+0123456789."))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"is not valid YAML: {error}") from None


def _message(error: Any) -> str:
    """The message for one of pydantic's errors, which names the field."""
    path = [str(part) for part in error["loc"] if not str(part).startswith(("literal[", "tuple["))]
    where = ".".join(path)
    if error["type"] == "extra_forbidden":
        section: Any = {"data": DataSection, "lora": LoraSection}.get(path[0] if len(path) > 1 else "", TrainConfig)
        return f"unknown field {where!r}; {_nearest(path[-1], section.model_fields)}"
    if error["type"] == "missing":
        return f"{where} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where and not message.startswith(where) else message


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"the fields are {', '.join(names)}" if len(names) < 20 else "the fields are those of DeepSeekTrainingArguments"
