"""Default sampling parameters of a model: those of its checkpoint, then those that its authors publish, then common ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal, get_args

from ..engine.request import SamplingParams
from ..errors import ConfigError, RequestError
from .published_sampling import published_sampling

Source = Literal["model", "vllm", "openai"]
SOURCES: tuple[Source, ...] = get_args(Source)
FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")  # of a generation config
_COMMON = {"temperature": 0.7, "top_p": 0.95}


@dataclass(frozen=True)
class SamplingDefaults:
    """Fields of `SamplingParams`. `not_thinking`: for answers without reasoning, if they differ from `values`."""

    values: Mapping[str, Any] = field(default_factory=dict)
    not_thinking: Mapping[str, Any] | None = None


def sampling_defaults(model: Any, name: str, source: Source = "model") -> SamplingDefaults:
    """The default sampling parameters for requests to a model.

    Args:
        model: of Transformers, with `config` and `generation_config`.
        name: of the model, or the path of its files, whose last parts are searched for the name of a family.
        source: where values come from. "model": each value from the generation config of the checkpoint if that has it, else
            from the settings that the model's authors publish (see `published_sampling`); if neither has a temperature, 0.7,
            with top_p 0.95 unless they have a top_p. "vllm": the generation config, else OpenAI's values, as vLLM does by
            default. "openai": temperature 1, top_p 1, and nothing else.

    As in vLLM, a generation config counts for the values that it has; `do_sample` is not considered.

    Raises:
        ConfigError: the generation config has a value outside its range.
    """
    if source == "openai":
        return SamplingDefaults()
    checkpoint = _checkpoint_values(model.generation_config)
    if source == "vllm":
        return SamplingDefaults(checkpoint)
    published = published_sampling(str(model.config.model_type), " ".join(PurePath(name).parts[-3:]))
    if published is None:
        return SamplingDefaults(_with_temperature(checkpoint))
    values = _with_temperature({**published.values, **checkpoint})
    if published.not_thinking is None:
        return SamplingDefaults(values)
    return SamplingDefaults(values, _with_temperature({**published.not_thinking, **checkpoint}))


def _checkpoint_values(config: Any) -> dict[str, Any]:
    """The sampling parameters that a generation config has."""
    values = {field: value for field in FIELDS if (value := getattr(config, field, None)) is not None}
    if values.get("top_k") == -1:  # all tokens, for some authors
        values["top_k"] = 0
    try:
        SamplingParams(**values)
    except RequestError as error:
        raise ConfigError(f"generation_config.json: {error}; correct it, or use --generation-config openai") from None
    return values


def _with_temperature(values: dict[str, Any]) -> dict[str, Any]:
    return values if "temperature" in values else {**_COMMON, **values}
