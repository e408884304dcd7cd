"""A method set on ONE model, in place of its class's: what all of them share."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, TypeVar

from .runtime import Runtime

Method = TypeVar("Method", bound="InstanceMethod")

PLANNED = "an optimised model runs a plan that is compiled already; leave torch.compile out, or fullgraph=True off"


class InstanceMethod:
    """Called without `self`; finds its model through the runtime, and follows the model when that is copied or pickled.

    Args:
        runtime: the model's, or what has `model`, `changed` and `copied` as a runtime has them.
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
    """One that stands for a method of the class: same signature, which `generate` and the Trainer look at."""

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
