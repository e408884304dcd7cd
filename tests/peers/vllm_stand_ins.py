"""Stand-ins for what vLLM's tests import from vLLM.

`get_tokenizer` and the name of the platform are what tests of a server need. Everything else can be imported, but raises an
error when it is called: such a test is not one of a server.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType, SimpleNamespace
from typing import Any


class PeerClassError(RuntimeError):
    """A test calls a class or function of vLLM."""


class Named:
    """Takes the place of a class, function or constant of vLLM."""

    def __init__(self, name: str, *_: Any, **__: Any) -> None:
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise PeerClassError(f"{self._name} is vLLM's own")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Named(f"{self._name}.{name}")

    def __or__(self, other: Any) -> Any:  # in annotations
        return self

    __ror__ = __or__

    def __getitem__(self, key: Any) -> Any:
        return self

    def _used(self, *_: Any) -> Any:
        raise PeerClassError(f"{self._name} is vLLM's own")

    __iter__ = __add__ = __radd__ = __sub__ = __mul__ = __lt__ = __gt__ = _used

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:  # as a base class
        return (object,)


class Platform:
    """The platform of the tests: none that needs a special case."""

    device_type = "cpu"

    def is_cpu(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Callable[..., bool]:
        return lambda *_, **__: False


class Answer(SimpleNamespace):
    """An answer's fields as attributes, in place of vLLM's classes of answers."""

    @classmethod
    def model_validate(cls, fields: Any) -> Any:
        if isinstance(fields, list):
            return [cls.model_validate(one) for one in fields]
        return cls(**{name: cls.model_validate(one) for name, one in fields.items()}) if isinstance(fields, dict) else fields


class Module(ModuleType):
    """A module of vLLM."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Named(f"{self.__name__}.{name}")


class StandIns(MetaPathFinder, Loader):
    """Finds the modules of vLLM.

    Args:
        given: names such as "vllm.platforms.current_platform" and their values.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given

    def install(self) -> None:
        sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if fullname.partition(".")[0] != "vllm":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        for name, value in self._given.items():
            owner, _, attribute = name.rpartition(".")
            if owner == module.__name__:
                setattr(module, attribute, value)
