"""Methods of ours on ONE model: how they find it, and how it outlives the caller's own reference to it."""

from __future__ import annotations

import weakref
from typing import Any


class Instance:
    """A model that has methods set on it.

    The model owns this object, and the way back is a weak reference, so that dropping the model frees everything at once. In
    `load_model(path).generate(...)` the model is dropped before the call begins: what it consists of is kept here, and `model`
    puts it together again.
    """

    _model: weakref.ref[Any]
    _class: type
    _parts: dict[str, Any]

    def methods(self) -> dict[str, Any]:
        """What the model gets in place of its class's own attributes, and beside them."""
        raise NotImplementedError

    @property
    def model(self) -> Any:
        """The model. Hold on to it as long as it is needed."""
        model = self._model()
        if model is None:
            model = object.__new__(self._class)
            model.__dict__.update(self._parts)
            self.attach(model)
        return model

    def attach(self, model: Any) -> None:
        """Sets the methods on this model."""
        self._model, self._class = weakref.ref(model), type(model)
        own = self.methods()
        self._parts = {name: value for name, value in model.__dict__.items() if name not in own}
        model.__dict__.update(own)
