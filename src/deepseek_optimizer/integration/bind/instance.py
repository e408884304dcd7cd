"""Replacing methods of a single model instance: reference to the model and its lifetime."""

from __future__ import annotations

import weakref
from typing import Any


class Instance:
    """Sets methods on one model, and gives them access to it.

    The model owns this object, which refers to it weakly, so that deleting the model frees everything at once. In
    `load_model(path).generate(...)` the model is deleted before the call begins: this object keeps its attributes, from which
    `model` rebuilds it.
    """

    _model: weakref.ref[Any]
    _class: type
    _parts: dict[str, Any]

    def methods(self) -> dict[str, Any]:
        """The attributes to set on the model, by name; they replace or extend those of its class."""
        raise NotImplementedError

    @property
    def model(self) -> Any:
        """The model. Keep a reference while it is in use: this object has only a weak one."""
        model = self._model()
        if model is None:
            model = object.__new__(self._class)
            model.__dict__.update(self._parts)
            self.attach(model)
        return model

    def attach(self, model: Any) -> None:
        """Sets the methods on `model`."""
        self._model, self._class = weakref.ref(model), type(model)
        own = self.methods()
        self._parts = {name: value for name, value in model.__dict__.items() if name not in own}
        model.__dict__.update(own)
