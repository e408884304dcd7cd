"""A model around an optimised decoder: a classifier, say, whose own code runs on the hidden states that the plan makes."""

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
    """Sets on the outer model what concerns all of it. Its forward stays its class's, and calls the decoder's.

    Args:
        model: a Transformers model without a head of the family's.
        runtime: of its decoder.
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
        """As `Runtime.manifest`."""
        return self.runtime.manifest

    def changed(self) -> str | None:
        """As `Runtime.changed`, of the decoder."""
        return self.runtime.changed()

    def check_weights(self) -> None:
        """As `Runtime.check_weights`, of the decoder."""
        self.runtime.check_weights()

    def copied(self, memo: dict[int, Any]) -> OuterModel:
        """The same for the copy that is being made of the model."""
        if (found := memo.get(id(self))) is None:
            found = memo[id(self)] = object.__new__(OuterModel)
            found.runtime = self.runtime.copied(memo)
            found._model, found._class = weakref.ref(memo[id(self._model())]), self._class
            found._parts = copy.deepcopy(self._parts, memo)
        return found

    def __reduce__(self) -> Any:
        return self.runtime.__reduce__()
