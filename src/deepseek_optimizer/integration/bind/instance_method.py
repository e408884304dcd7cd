"""Base classes of methods that are set on a single model instance."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, TypeVar

from .runtime import Runtime

Method = TypeVar("Method", bound="InstanceMethod")

PLANNED = "an optimized model already runs a compiled plan; do not use torch.compile, or use it without fullgraph=True"


class InstanceMethod:
    """A callable without `self`: it reaches its model through the runtime, and is copied with the model.

    Args:
        runtime: the model's runtime, or an object with the same `model`, `changed` and `copied`.
    """

    runtime: Any

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime

    def __deepcopy__(self: Method, memo: dict[int, Any]) -> Method:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.runtime = self.runtime.copied(memo)
        return twin

    def __reduce__(self) -> Any:
        return self.runtime.__reduce__()


class Replacement(InstanceMethod):
    """An instance method with the signature of the class's method that it replaces; `generate` and the Trainer inspect it."""

    runtime: Runtime
    replaces: ClassVar[str]

    def __init__(self, runtime: Any) -> None:
        super().__init__(runtime)
        model = runtime.model
        self._original = getattr(type(model), self.replaces)
        self.__signature__ = inspect.signature(self._original.__get__(model))
        self._order = [n for n, p in self.__signature__.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name."""
        return {**dict(zip(self._order, args, strict=False)), **kwargs}
