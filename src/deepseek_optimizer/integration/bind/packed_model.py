"""What every optimized model has, with or without an execution plan: settings, packed weights, a backend, and warnings."""

from __future__ import annotations

import copy
import mmap
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from ...backends.base import Backend
from ...backends.registry import choose_backend
from ...checkpoint import Manifest
from ...config import DeepSeekConfig
from ...errors import BackendError, ConfigError
from ...profiles import Profile
from .instance import Instance
from .modules import Packed, PackedLinear
from .packed_experts import PackedExperts

_NO_PICKLE = "an optimized model cannot be pickled; save it with save_pretrained and load it with load_model"

Model = TypeVar("Model", bound="PackedModel")


class OptimizerWarning(UserWarning):
    """Something works, but more slowly than it could. Issued once per model."""


class PackedModel(Instance):
    """The settings, weights and backend of one model with packed modules. Available as `model.dso`.

    Args:
        model: the model.
        config: the settings.
        manifest: format and shape of each packed weight.
        methods: creates the attributes to set on the model in place of its class's, by name.
        make_report: creates the report about what was optimized.
        bytes_before: size of the model before it was packed, for the report.

    Attributes:
        model: that instance.
        config: the settings the model was optimized with.
        manifest: current format and shape of each packed weight, and how the formats were chosen.
        backend: runs the plan, or the products of the packed modules.
        notes: warnings issued so far, for the report.
        profile, profile_note: the profile that the settings are from, if any, and what the report says about it.
        mappings: the `MappedFile`s that contain weights, while in use.
        no_plan: why the model has no execution plan; None: it has one.
    """

    no_plan: str | None = None

    def __init__(
        self,
        model: Any,
        config: DeepSeekConfig,
        manifest: Manifest,
        *,
        methods: Callable[[Any], dict[str, Any]],
        make_report: Callable[[Any], Any],
        bytes_before: int | None = None,
    ) -> None:
        self._model = weakref.ref(model)
        self._methods, self._make_report = methods, make_report
        self.config, self.manifest, self.bytes_before = config, manifest, bytes_before
        self.notes: list[str] = []
        self.profile: Profile | None = None
        self.profile_note: str | None = None
        self._warned: set[str] = set()
        self.mappings: weakref.WeakSet[Any] = weakref.WeakSet()
        self._making = threading.RLock()  # lazily created attributes are created once, also with several threads
        self._backend: Backend | None = None

    def methods(self) -> dict[str, Any]:
        return {"dso": self, **self._methods(self)}

    @property
    def backend(self) -> Backend:
        with self._making:
            if self._backend is None:
                self._backend, note = choose_backend(self.config, self.model.device)
                if note:
                    self.warn_once(note)
                self._set_products(self._backend)
            return self._backend

    def use(self, backend: Backend) -> None:
        """Uses a backend that was created for this model alone."""
        with self._making:
            self._backend = backend
            self._set_products(backend)

    def share(self, other: PackedModel) -> None:
        """Uses the backend of another model, which has the same settings and is on the same device."""
        with self._making:
            self._backend = other.backend
            self._set_products(self._backend)

    def _set_products(self, backend: Backend) -> None:
        """Has packed modules compute with the backend's products, and check their weights with it."""
        intact = NoCopyCallable(backend.check_tensor)
        product, gradient = NoCopyCallable(self._product(backend)), NoCopyCallable(backend.linear_gradient)
        for module in self.model.modules():
            if isinstance(module, Packed):
                module.check_tensor = intact
            if isinstance(module, (PackedLinear, PackedExperts)):
                module.product, module.gradient = product, gradient

    def _product(self, backend: Backend) -> Callable[..., Any]:
        """The product of packed modules: `Backend.linear` with the default options."""
        return backend.linear

    def check_weights(self) -> None:
        """Raises CheckpointChangedError if a file that weights are mapped from was modified after loading."""
        for module in self.model.modules():
            if isinstance(module, Packed):
                module.intact(None)

    def replaced_files(self) -> list[str]:
        """Paths of mapped files that were replaced or deleted since loading; the model continues to use the loaded files."""
        return sorted(str(path) for mapping in self.mappings if (path := mapping.replaced()) is not None)

    def release_pages(self) -> None:
        """Releases the memory of weights that are mapped from files; they are read from the files again when they are used."""
        for mapping in self.mappings:
            mapping.madvise(mmap.MADV_DONTNEED)

    def read_ahead(self) -> None:
        """Begins to read mapped weights from their files, so that the first use does not wait for every page."""
        for mapping in self.mappings:
            mapping.madvise(mmap.MADV_WILLNEED)

    def warn_once(self, note: str) -> None:
        """Issues `note` as an OptimizerWarning, once per model, and adds it to `notes`."""
        if note not in self._warned:
            self._warned.add(note)
            self.notes.append(note)
            warnings.warn(note, OptimizerWarning, stacklevel=4)

    def report(self) -> Any:
        """A report about what was optimized and how."""
        return self._make_report(self)

    def __deepcopy__(self: Model, memo: dict[int, Any]) -> Model:
        model = memo.get(id(self._model()))
        if model is None:
            raise BackendError("a plan can be copied only with its model; use copy.deepcopy(model)")
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__)
        twin._model = weakref.ref(model)
        twin._parts = copy.deepcopy(self._parts, memo)
        twin._making = threading.RLock()
        twin.mappings = weakref.WeakSet()  # its weights are in memory
        twin.config = copy.deepcopy(self.config, memo)
        twin.notes, twin._warned = list(self.notes), set(self._warned)
        return twin

    def copied(self: Model, memo: dict[int, Any]) -> Model:
        """The runtime of the copy of the model that `copy.deepcopy` is creating."""
        twin: Model = memo.get(id(self)) or self.__deepcopy__(memo)
        return twin

    def __reduce__(self) -> Any:
        raise BackendError(_NO_PICKLE)


class NoCopyCallable:
    """A callable that copies of a model share, because what it uses (a thread pool) cannot be copied."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoCopyCallable:
        return self

    def __reduce__(self) -> Any:
        raise BackendError(_NO_PICKLE)


def packed_model_of(model: Any) -> PackedModel:
    """What an optimized model has as `model.dso`, also through a PEFT wrapper.

    Raises:
        ConfigError: the model is not optimized.
    """
    for candidate in (model, getattr(getattr(model, "base_model", None), "model", None)):
        runtime = getattr(candidate, "__dict__", {}).get("dso")
        if isinstance(runtime, PackedModel):
            return runtime
    raise ConfigError(
        f"{type(model).__name__} is not an optimized model; load it with load_model or quantization_config="
        "DeepSeekConfig(...), or convert it with DynamicGraphOptimizer(model).optimize()"
    )
