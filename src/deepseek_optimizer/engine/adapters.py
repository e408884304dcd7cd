"""The LoRA adapters that an engine's requests may use, by name. Loaded and unloaded while the engine runs. No torch.

Files are read by the calling thread, not the engine's. An adapter that is unloaded cannot be chosen any more, but requests that
use it already continue with it; its slot is free after the last one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..backends.base import AdapterStore
from ..errors import RequestError, excerpt, shown

MAX_NAME = 256  # characters of an adapter's name


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter's matrices for the sites of a graph.

    Attributes:
        pairs: by site A and B of its `pair_shapes`, torch tensors that contain the adapter's scale.
        rank: the largest rank.
        identity: 16 bytes; equal for adapters with the same matrices.
    """

    pairs: Mapping[int, tuple[Any, Any]]
    rank: int
    identity: bytes


# (path, function that is called with the rank of each site before tensors are read) -> the adapter
ReadAdapter = Callable[[Path, Callable[[Mapping[int, int]], None]], AdapterWeights]


@dataclass(eq=False)
class Adapter:
    """A loaded adapter.

    Attributes:
        name: what requests call it.
        path: its directory.
        slot: its slot in the backend's store.
        rank: the largest rank of its matrices.
        nbytes: memory of its matrices.
        identity: 16 bytes that determine its results; cached prefixes are shared between equal ones only.
        created: time at which it was loaded, in seconds since the epoch.
        users: number of requests in the engine that use it.
        unloaded: whether it can no longer be chosen.
    """

    name: str
    path: Path
    slot: int
    rank: int
    nbytes: int
    identity: bytes
    created: int = field(default_factory=lambda: int(time.time()))
    users: int = 0
    unloaded: bool = False


class HasAdapters(Protocol):
    """An engine core."""

    adapters: Adapters | None


def adapters_of(core: HasAdapters) -> Adapters:
    """The adapters of an engine core. Raises RequestError if it supports none."""
    if core.adapters is None:
        raise RequestError("adapter", "this engine has no adapters; create it with max_loras (--max-loras)")
    return core.adapters


class Adapters:
    """Assigns the slots of a backend's store to adapters. Thread-safe.

    Args:
        store: the store.
        read: reads an adapter's files.
        check_memory: called with a number of bytes that are about to be allocated; raises NotEnoughMemoryError.
        reserved: names that no adapter may have: those of the model.
    """

    def __init__(
        self,
        store: AdapterStore,
        read: ReadAdapter,
        check_memory: Callable[[int], None] = lambda _: None,
        reserved: frozenset[str] = frozenset(),
    ) -> None:
        self.store, self.reserved = store, reserved
        self._read, self._check_memory = read, check_memory
        self._lock = threading.Lock()
        self._free = list(range(store.slots - 1, -1, -1))
        self._named: dict[str, Adapter] = {}
        self._leaving: list[Adapter] = []  # unloaded, but in use
        self._loading: set[str] = set()

    @property
    def loaded(self) -> list[Adapter]:
        """The adapters that requests can choose, in the order in which they were loaded."""
        with self._lock:
            return list(self._named.values())

    def load(self, name: str, path: str | Path, replace: bool = False) -> Adapter:
        """Loads an adapter.

        Args:
            name: what requests are to call it.
            path: a directory as PEFT writes it.
            replace: whether an adapter of this name is unloaded then, as `unload` does; otherwise the name must be free.

        Raises:
            RequestError: the name is taken or invalid, or there is no free slot.
            AdapterError, CheckpointError: the adapter does not fit the model, is damaged, or has an unsupported feature.
            NotEnoughMemoryError: it does not fit in free memory.
        """
        slot = self._reserve(name, replace)
        size = 0

        def check_size(ranks: Mapping[int, int]) -> None:
            nonlocal size
            size = self.store.adapter_bytes(ranks)
            self._check_memory(size)

        try:
            weights = self._read(Path(path), check_size)
            self.store.load(slot, weights.pairs)
        except BaseException:
            with self._lock:
                self._free.append(slot)
                self._loading.discard(name)
            raise
        adapter = Adapter(name, Path(path), slot, weights.rank, size, weights.identity)
        with self._lock:
            self._loading.discard(name)
            if (former := self._named.pop(name, None)) is not None:
                self._retire(former)
            self._named[name] = adapter
        return adapter

    def _reserve(self, name: str, replace: bool) -> int:
        """Takes a slot for a new adapter of this name."""
        if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
            raise RequestError("lora_name", f"must be 1 to {MAX_NAME} printable characters, got {shown(name)}")
        with self._lock:
            if name in self.reserved:
                raise RequestError("lora_name", f"{shown(name)} is the name of the model; choose another")
            if (name in self._named and not replace) or name in self._loading:
                raise RequestError("lora_name", f"{shown(name)} has already been loaded; unload it first")
            if not self._free:
                count = self.store.slots
                rest = f", and requests still use {len(self._leaving)} unloaded one(s)" if self._leaving else ""
                raise RequestError(
                    "lora_name", f"all {count} slots are taken{rest}; unload another adapter, or raise max_loras"
                )
            self._loading.add(name)
            return self._free.pop()

    def unload(self, name: str) -> Adapter:
        """Removes an adapter: no further request can choose it. Its memory is freed once no request uses it.

        Raises:
            RequestError: there is no adapter of this name.
        """
        with self._lock:
            adapter = self._named.pop(name, None)
            if adapter is None:
                raise RequestError("lora_name", f"there is no adapter {shown(name)}")
            self._retire(adapter)
            return adapter

    def _retire(self, adapter: Adapter) -> None:
        """Frees the slot of an adapter that can no longer be chosen, now or once no request uses it."""
        adapter.unloaded = True
        if adapter.users:
            self._leaving.append(adapter)
        else:
            self._clear(adapter)

    def check(self, name: str) -> None:
        """Raises RequestError if there is no adapter of this name."""
        with self._lock:
            if name not in self._named:
                raise self._unknown(name)

    def acquire(self, name: str) -> Adapter:
        """The adapter of this name, which stays in its slot until `release`.

        Raises:
            RequestError: there is no adapter of this name.
        """
        with self._lock:
            adapter = self._named.get(name)
            if adapter is None:
                raise self._unknown(name)
            adapter.users += 1
            return adapter

    def release(self, adapter: Adapter) -> None:
        """Ends one use of an adapter. Not to be called during a step that uses it."""
        with self._lock:
            adapter.users -= 1
            if adapter.unloaded and not adapter.users:
                self._leaving.remove(adapter)
                self._clear(adapter)

    def _clear(self, adapter: Adapter) -> None:
        self.store.clear(adapter.slot)
        self._free.append(adapter.slot)

    def _unknown(self, name: str) -> RequestError:
        names = excerpt(", ".join(self._named)) or "none"
        return RequestError("adapter", f"there is no adapter {shown(name)}; loaded: {names}")
