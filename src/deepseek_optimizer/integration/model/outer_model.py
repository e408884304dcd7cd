"""A model around an optimized decoder, such as a classifier, whose own code runs on the plan's hidden states."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from ...checkpoint import Manifest
from ..bind.instance import Instance
from ..bind.runtime import Runtime
from .adapters import ModuleWalk
from .parameter_count import ParameterCount
from .refuse import RESIZE, Refuse
from .save import PackedSave


class OuterModel(Instance):
    """Sets on the outer model the methods that concern the whole model. Its forward stays that of its class.

    Args:
        model: a Transformers model without the family's language model head.
        runtime: the runtime of its decoder.
    """

    def __init__(self, model: Any, runtime: Runtime) -> None:
        self.runtime = runtime
        self.attach(model)

    def methods(self) -> dict[str, Any]:
        return {
            "dso": self.runtime,
            "save_pretrained": PackedSave(self),
            "resize_token_embeddings": Refuse(RESIZE),
            "num_parameters": ParameterCount(self),
            "report": self.runtime.report,
            "named_modules": ModuleWalk(self),
        }

    @property
    def manifest(self) -> Manifest:
        """The decoder's `Runtime.manifest`."""
        return self.runtime.manifest

    def changed(self) -> str | None:
        """The decoder's `Runtime.changed`."""
        return self.runtime.changed()

    def check_weights(self) -> None:
        """The decoder's `Runtime.check_weights`."""
        self.runtime.check_weights()

    def copied(self, memo: dict[int, Any]) -> OuterModel:
        """The outer model of the copy that `copy.deepcopy` is creating."""
        if (twin := memo.get(id(self))) is None:
            twin = memo[id(self)] = object.__new__(OuterModel)
            twin.runtime = self.runtime.copied(memo)
            twin._model, twin._class = weakref.ref(memo[id(self._model())]), self._class
            twin._parts = copy.deepcopy(self._parts, memo)
        return twin

    def __reduce__(self) -> Any:
        return self.runtime.__reduce__()
