"""Chooses the backend that runs a model.

A backend is registered as an entry point of the group "deepseek_optimizer.backends" that refers to a `BackendSpec`, so that
another package can add a backend: see `system/backend_entries.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Protocol

from ..errors import BackendError, DeepSeekOptimizerError
from ..system.backend_entries import AUTO, entry_of, names, package_of
from .base import Backend, Sizes

if TYPE_CHECKING:
    import torch

    from ..graph.ir import Graph

FALLBACK = 0  # priority of a backend that is used only if no other can run
BY_NAME = -1  # priority of a backend that "auto" never chooses


class BackendSettings(Protocol):
    """The settings that choose and configure a backend; `DeepSeekConfig` has them.

    Attributes:
        backend: a registered name, or "auto": the best one that can run on the model's device.
        isa, threads: see `DeepSeekConfig`; None: the backend decides.
        cuda_graphs: see `DeepSeekConfig`.
    """

    @property
    def backend(self) -> str: ...

    @property
    def isa(self) -> str | None: ...

    @property
    def threads(self) -> int | None: ...

    @property
    def cuda_graphs(self) -> bool: ...


@dataclass(frozen=True)
class BackendSpec:
    """A backend that is not created yet: the object that an entry point refers to.

    Attributes:
        name: as in `DeepSeekConfig(backend=name)`; the entry point has the same name.
        create: creates the backend for a device and settings. Raises BackendError if it cannot run.
        sizes: returns the sizes of its allocations. Raises BackendError if these are unknown.
        unavailable_reason: why "auto" must not choose it on this machine, with the remedy; None: it can run.
        device_types: torch's device types that it runs on; None: all of them.
        priority: "auto" chooses the highest among the available ones that run on the device. The native CPU backend has 100,
            the reference backend FALLBACK; one with BY_NAME must be named.
        check_graph: raises BackendError, which names op and family, if the backend does not compute all of a graph with this
            type of cache. Called before weights are read; `Backend.compile` checks it too.
    """

    name: str
    create: Callable[[torch.device, BackendSettings], Backend]
    sizes: Callable[[], Sizes]
    unavailable_reason: Callable[[BackendSettings], str | None] = lambda settings: None
    device_types: tuple[str, ...] | None = None
    priority: int = 50
    check_graph: Callable[[Graph, str], None] = lambda graph, kv_dtype: None

    def runs_on(self, device_type: str) -> bool:
        return self.device_types is None or device_type in self.device_types


def find(name: str) -> BackendSpec:
    """The registered backend called `name`.

    Raises:
        BackendError: it is not registered, or its package cannot be imported.
    """
    entry = entry_of(name)
    if entry is None:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise BackendError(
            f"there is no backend {name!r}{hint} (registered: {', '.join(names())}); install the package that provides it, or "
            'use backend="auto"'
        )
    try:
        spec = entry.load()
    except Exception as error:  # another package may raise anything at import
        raise _broken(entry, f"cannot be loaded ({type(error).__name__}: {error})") from error
    if not isinstance(spec, BackendSpec) or spec.name != name:
        raise _broken(entry, f"is registered as {entry.value}, which is not a BackendSpec of that name")
    return spec


def runs_on(name: str, device_type: str) -> bool:
    """Whether `DeepSeekConfig(backend=name)` can run a model on this type of device; "auto" always can."""
    return name == AUTO or find(name).runs_on(device_type)


def is_fallback(name: str) -> bool:
    """Whether the backend called `name` is used only if no other can run: plain torch, much slower."""
    return find(name).priority == FALLBACK


def choose_spec(settings: BackendSettings, device: torch.device) -> tuple[BackendSpec, str | None]:
    """The backend for a model on `device`, and a note if it may not be the one that the user expects, else None.

    Raises:
        BackendError: the settings name a backend that is not registered, cannot be loaded, or does not support the device.
    """
    if settings.backend != AUTO:
        spec = find(settings.backend)
        if not spec.runs_on(device.type):
            target = (spec.device_types or ("cpu",))[0]
            raise BackendError(f"the {spec.name} backend cannot run a model on {device}; move it with model.to({target!r})")
        return spec, None
    notes, missing = [], None
    candidates = []
    for name in names():
        try:
            candidates.append(find(name))
        except BackendError as error:
            notes.append(f"not considered: {error}")
    for spec in sorted(candidates, key=lambda spec: -spec.priority):
        if spec.priority == BY_NAME or not spec.runs_on(device.type):
            continue
        reason = spec.unavailable_reason(settings)
        if reason is not None:
            missing = missing or (spec, reason)
            continue
        if missing is not None:
            slower = "much slower" if spec.priority == FALLBACK else "slower"
            notes.insert(0, f"using the {spec.name} backend, {slower} than the {missing[0].name} backend: {missing[1]}")
        elif spec.priority == FALLBACK and device.type != "cpu":
            notes.insert(0, f"the model is on {device}: using the {spec.name} backend")
        return spec, "; ".join(notes) or None
    raise BackendError(f"no registered backend supports {device} (registered: {', '.join(names())}); move the model to the CPU")


def choose_backend(settings: BackendSettings, device: torch.device) -> tuple[Backend, str | None]:
    """Creates the backend for a model on `device`; also returns a note about the choice for the user, or None.

    Raises:
        BackendError: see `choose_spec`; or the backend cannot run on this machine.
        ConfigError: a setting is invalid.
    """
    spec, note = choose_spec(settings, device)
    try:
        backend = spec.create(device, settings)
    except (DeepSeekOptimizerError, MemoryError):
        raise
    except Exception as error:
        raise BackendError(
            f"the {spec.name} backend cannot be created ({type(error).__name__}: {error}); use another backend, or report this "
            "to the package that provides it"
        ) from error
    return backend, note or backend.note


def _broken(entry: EntryPoint, what: str) -> BackendError:
    return BackendError(
        f'the backend {entry.name!r}{package_of(entry)} {what}; reinstall or uninstall its package, or use backend="reference"'
    )
