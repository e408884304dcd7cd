"""Over how many processes a model is divided, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...errors import ConfigError

MOST_RANKS = 64


@dataclass(frozen=True)
class Parallel:
    """How a model is divided among processes; each field is a number of processes.

    Attributes:
        tensor: each layer is divided, see `graph/parallel/tensor.py`.
        expert: as `tensor`, but each process has whole experts. With both, a process has a part of each of some experts.
        pipeline: the layers are divided, see `graph/parallel/pipeline.py`; not together with the others.

    Raises:
        ConfigError: a value is not supported.
    """

    tensor: int = 1
    expert: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_RANKS:
                raise ConfigError(f"parallel: {field.name} must be an integer from 1 to {MOST_RANKS}, got {value!r}")
        if self.pipeline > 1 and self.tensor * self.expert > 1:
            raise ConfigError(f"parallel: {self} cannot be combined; set pipeline alone, or tensor and expert")
        if self.ranks > MOST_RANKS:
            raise ConfigError(f"parallel: {self} are {self.ranks} processes; there can be {MOST_RANKS} at most")

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.tensor * self.expert * self.pipeline

    @property
    def at_once(self) -> int:
        """Number of processes that compute at the same time, and share the cores: of a pipeline one."""
        return self.tensor * self.expert

    def __str__(self) -> str:
        """The fields that divide something, for messages: `tensor=2`."""
        return ", ".join(f"{name}={count}" for name, count in self.to_dict().items() if count > 1) or "tensor=1"

    def to_dict(self) -> dict[str, int]:
        """The fields as JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of(cls, value: Any) -> Parallel:
        """From a mapping with some of the fields, or a `Parallel`.

        Raises:
            ConfigError: the value is neither, or a field is unknown or invalid.
        """
        if isinstance(value, cls):
            return value
        names = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping):
            raise ConfigError(f'parallel must be a dict such as {{"tensor": 2}}, got {value!r}')
        for name in value:
            if name not in names:
                raise ConfigError(f"parallel has no field {name!r}; its fields are {', '.join(names)}")
        return cls(**value)
