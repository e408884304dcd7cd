"""The layers of a vision tower as plans that run over some of the rows at a time.

Layers with windows run together over whole windows. Of a layer whose rows attend to the whole picture, one plan writes keys and
values to a cache, and another one attends to them. So a large picture is encoded in pieces of any size, between which other
work can be done; results do not depend on the pieces.
"""

from __future__ import annotations

import copy
import math
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ...backends.base import BLOCK_TOKENS, CompileOptions, Int32, KvStore, Plan
from ...graph import rules
from ...graph.analysis import weight_shapes
from ...graph.ir import Graph
from ...graph.partial_graph import graph_between, halves_over_cache
from ...models import Tower
from ..bind.graphs import with_eps_of
from ..bind.module_tree import ModuleTree
from ..bind.swap import weights_of
from ..encoder.rows import step_batch, steps_of

_UNKNOWN = 64  # rows of a piece whose time is limited, before its plan has been measured
_SIMPLE = 256  # rows of a piece of what is before and after the layers; a multiple of the patches that become a token
_KEPT_BYTES = 64 << 20  # of the cache, after a call: mapping pages anew takes as long as a layer
_KEPT_GRIDS = 4  # sizes of pictures whose plans are kept
_FEWEST = 32  # rows of such a piece, below which reading the weights would take most of the time


@dataclass(frozen=True)
class PaddedWindows:
    """Windows that are filled up with padding.

    Attributes:
        places: int64 [rows of all windows], the row of the call that each of them is, -1: padding.
        axes: int32 [rows of all windows, 3], the place of each within its window, as in `Patches`; in time not 0: padding.
    """

    places: torch.Tensor
    axes: Int32


@dataclass(frozen=True)
class Patches:
    """What the rows of a call are.

    Attributes:
        pictures: number of rows of each picture (of each frame of a video).
        windows: number of rows of each window, which divide the pictures; (): the tower has none.
        axes: int32 [rows, 3], the position of each row in time, height and width; None: RoPE does not need it.
        positions: int32 [rows], the position of each row, for RoPE without axes; None: all are 0.
        sees: int32 [rows], how many of its picture's first rows each row attends to, at least one; None: all. Within a picture
            it is one number, or does not descend and includes the row itself.
        grid: rows and columns of patches of each picture, for towers that depend on it (`Tower.on_grid`).
        padded: if windows are filled up with padding; the rows of the call are then in order of pictures.
    """

    pictures: list[int]
    windows: list[int]
    axes: Int32 | None = None
    positions: Int32 | None = None
    sees: Int32 | None = None
    grid: tuple[int, int] | None = None
    padded: PaddedWindows | None = None


class Pace(threading.local):
    """How the pictures are encoded that this thread asks for.

    Attributes:
        next_piece: called before each piece; returns how many seconds it may take. None: pieces are as large as steps may be.
    """

    next_piece: Callable[[], float] | None = None

    @contextmanager
    def between(self, next_piece: Callable[[], float]) -> Iterator[None]:
        """Has pictures encoded in pieces."""
        before, self.next_piece = self.next_piece, next_piece
        try:
            yield
        finally:
            self.next_piece = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Pace:
        return Pace()


class Piecewise:
    """A plan that runs over pieces of the rows.

    Args:
        plan: the plan.
        most: maximum number of rows of a piece.
    """

    def __init__(self, plan: Plan, most: int) -> None:
        self.plan, self._most = plan, most
        self._seconds = 0.0  # per row, of the last piece

    def rows(self, pace: Pace) -> int:
        """How many rows the next piece has."""
        if pace.next_piece is None:
            return self._most
        seconds = pace.next_piece()
        if math.isinf(seconds):
            return self._most
        wanted = int(seconds / self._seconds) if self._seconds else _UNKNOWN
        return min(max(wanted, _FEWEST), self._most)

    def run(self, batch: Any, store: KvStore | None) -> torch.Tensor | None:
        """The last hidden states of a piece, if the step asks for them."""
        begin = time.perf_counter()
        made = self.plan.run(batch, store).last_hidden
        self._seconds = (time.perf_counter() - begin) / len(batch.positions)
        return made


@dataclass(frozen=True)
class Stretch:
    """Layers that run one after the other.

    Attributes:
        last: the last one.
        results: computes their results; of a layer without windows, from the cache.
        writes: writes the keys and values; None: the layers have windows.
    """

    last: int
    results: Piecewise
    writes: Piecewise | None = None


@dataclass
class Compiled:
    """The plans of a tower.

    Attributes:
        stretches: its layers.
        cache: a graph with the cache of a layer without windows; None: all have windows.
        stores: memory for that cache, by dtype.
    """

    stretches: list[Stretch]
    cache: Graph | None = None
    stores: dict[str, KvStore] = field(default_factory=dict)


class TowerPlans:
    """The plans of a tower, which read the storage of its packed modules. A call waits for the one before it.

    Args:
        runtime: the `MultimodalRuntime`, which the model keeps alive.
        module: the module that has the layers.
        tower: the layers.
    """

    def __init__(self, runtime: Any, module: Any, tower: Tower) -> None:
        self._runtime, self._module, self.tower = weakref.ref(runtime), weakref.ref(module), tower
        self._tree = ModuleTree(module)
        self._begin()

    def _begin(self) -> None:
        self._compiled: OrderedDict[tuple[int, int] | None, Compiled] = OrderedDict()  # by grid, least recently used first
        self._bound: list[tuple[torch.Tensor, int]] = []  # what the plans were compiled from, see `_replaced`
        self._running = threading.Lock()

    @property
    def runtime(self) -> Any:
        """The runtime; None if the model was deleted, and only its tower is left."""
        return self._runtime()

    @property
    def model(self) -> Any:
        """The module."""
        return self._module()

    def why_not(self) -> str | None:
        """Why the plans cannot serve the tower as it is now (an adapter, a hook, training); None if they can."""
        return "the model was deleted" if self.runtime is None else self._tree.unserved(self.model)

    def forget(self) -> None:
        """Call after the storage of the weights or the backend has changed."""
        with self._running:
            self._discard()

    def _discard(self) -> None:
        self._compiled.clear()
        self._bound = []

    def run(self, x: torch.Tensor, patches: Patches) -> dict[int, torch.Tensor]:
        """The results of the last layer and of the tower's `ends`, by layer, in the dtype of `x`.

        Args:
            x: [rows, hidden], the embeddings, window after window where the tower has windows.
            patches: what the rows are.
        """
        results: dict[int, torch.Tensor] = {}
        state = x.float()
        wanted = {*self.tower.ends, len(self.tower.windowed) - 1}
        with self._running:
            compiled = self._plans(patches.grid)
            for stretch in compiled.stretches:
                if stretch.writes is not None:
                    state = self._whole(compiled, stretch, state, patches, x.dtype)
                elif patches.padded is None:
                    state = self._windows(stretch.results, state, patches)
                else:
                    state = self._padded_windows(stretch.results, state, patches.windows, patches.padded)
                if stretch.last in wanted:
                    results[stretch.last] = state.to(x.dtype)
            for store in compiled.stores.values():
                store.release(min(store.num_blocks, _KEPT_BYTES // store.block_bytes))
        return results

    def take_turn(self) -> None:
        """Call before work that cannot be divided, such as a convolution."""
        if self.runtime.pace.next_piece is not None:
            self.runtime.pace.next_piece()

    def in_pieces(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """function(x), for a function of groups of a few successive rows: of patches, or of those that become a token."""
        pace = self.runtime.pace
        if pace.next_piece is None:
            return function(x)
        made = []
        for rows in x.split(_SIMPLE):
            pace.next_piece()
            made.append(function(rows))
        return torch.cat(made)

    def _replaced(self) -> bool:
        """Whether a parameter or buffer has other storage than the plans were compiled from, or has been written to. That
        storage is kept, so that nothing else can be at its address."""
        tensors = self._held()
        return len(tensors) != len(self._bound) or any(
            tensor.data_ptr() != bound.data_ptr() or _writes(tensor) != version
            for tensor, (bound, version) in zip(tensors, self._bound, strict=True)
        )

    def _held(self) -> list[torch.Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def _plans(self, grid: tuple[int, int] | None) -> Compiled:
        """The plans for pictures with so many rows and columns of patches."""
        if self._bound and self._replaced():
            self._discard()
        if grid in self._compiled:
            self._compiled.move_to_end(grid)
            return self._compiled[grid]
        if not self._bound:
            self._bound = [(tensor.detach(), _writes(tensor)) for tensor in self._held()]
        graph = self.tower.graph if grid is None or self.tower.on_grid is None else self.tower.on_grid(*grid)
        of_windows = {s.last: s for known in self._compiled.values() for s in known.stretches if s.writes is None}
        made = Compiled([])
        for begin, end in self.tower.stretches():
            part = graph_between(graph, begin, end)
            if self.tower.windowed[begin]:
                made.stretches.append(of_windows.get(end - 1) or Stretch(end - 1, self._compile(part)))
                continue
            write, made.cache = halves_over_cache(part)
            made.stretches.append(Stretch(end - 1, self._compile(made.cache), self._compile(write)))
        self._compiled[grid] = made
        while len(self._compiled) > _KEPT_GRIDS:
            self._compiled.popitem(last=False)
        return made

    def _compile(self, graph: Graph) -> Piecewise:
        runtime, module = self.runtime, self.model
        graph = with_eps_of(module, rules.apply(graph, runtime.config.rules)[0])
        options = CompileOptions(activation=runtime.config.activation)
        weights = {**weights_of(module, graph)}
        for name, (rows, _) in _grid_tables(graph).items():
            weights[name] = _resized(module.get_parameter(name).detach(), rows)
        return Piecewise(runtime.backend.compile(graph, weights, options), runtime.config.prefill_chunk)

    def _padded_windows(self, piecewise: Piecewise, x: torch.Tensor, windows: list[int], padded: PaddedWindows) -> torch.Tensor:
        real = padded.places >= 0
        rows = x.new_zeros(len(padded.places), x.shape[1])
        rows[real] = x[padded.places[real]]
        made = self._windows(piecewise, rows, Patches([], windows, padded.axes))
        result = torch.empty_like(x)
        result[padded.places[real]] = made[real]
        return result

    def _windows(self, piecewise: Piecewise, x: torch.Tensor, patches: Patches) -> torch.Tensor:
        result, begin, first = torch.empty_like(x), 0, 0
        while first < len(patches.windows):
            _, count = next(steps_of(patches.windows[first:], piecewise.rows(self.runtime.pace)))
            lengths = patches.windows[first : first + count]
            part = slice(begin, begin + sum(lengths))
            made = piecewise.run(_batch(x, part, lengths, patches), None)
            assert made is not None
            result[part] = made
            begin, first = part.stop, first + count
        return result

    def _whole(
        self, compiled: Compiled, stretch: Stretch, x: torch.Tensor, patches: Patches, dtype: torch.dtype
    ) -> torch.Tensor:
        writes, results = stretch.writes, stretch.results
        assert writes is not None
        starts = [0, *accumulate(patches.pictures)]
        store, tables = self._cache(compiled, patches.pictures, dtype)
        sees = np.repeat(patches.pictures, patches.pictures).astype(np.int32) if patches.sees is None else patches.sees
        result = torch.empty_like(x)
        for piecewise in (writes, results):
            begin = 0
            while begin < len(x):
                part = slice(begin, min(len(x), begin + piecewise.rows(self.runtime.pace)))
                inside = list(_overlaps(starts, part))
                if piecewise is results:
                    inside = list(_last_rows(inside, sees[part]))
                batch = _batch(x, part, [count for _, _, count in inside], patches)
                batch.block_table = tables[[picture for picture, _, _ in inside]]
                batch.context_len = np.array([context for _, context, _ in inside], np.int32)
                if piecewise is writes:
                    batch.last_hidden = False
                else:
                    batch.visible_to = np.ascontiguousarray(sees[part])
                made = piecewise.run(batch, store)
                if made is not None:
                    result[part] = made
                begin = part.stop
        return result

    def _cache(self, compiled: Compiled, pictures: Sequence[int], dtype: torch.dtype) -> tuple[KvStore, Int32]:
        """A store for keys and values of all rows, and the blocks of each picture: int32 [pictures, blocks]."""
        blocks = [-(-rows // BLOCK_TOKENS) for rows in pictures]
        kind = "bf16" if dtype is torch.bfloat16 else "fp32"
        stores = compiled.stores
        if kind not in stores or stores[kind].num_blocks < sum(blocks):
            assert compiled.cache is not None
            stores[kind] = self.runtime.backend.new_store(compiled.cache, kind, sum(blocks))
        tables = np.zeros((len(pictures), max(blocks)), np.int32)
        for table, begin, count in zip(tables, [0, *accumulate(blocks)], blocks, strict=False):
            table[:count] = np.arange(begin, begin + count)
        return stores[kind], tables

    def copied(self, memo: dict[int, Any]) -> TowerPlans:
        """The plans of the copy of the model that `copy.deepcopy` is creating."""
        return copy.deepcopy(self, memo)

    def __deepcopy__(self, memo: dict[int, Any]) -> TowerPlans:
        if id(self) in memo:
            known: TowerPlans = memo[id(self)]
            return known
        twin = object.__new__(TowerPlans)
        memo[id(self)] = twin
        twin._runtime = weakref.ref(self.runtime.copied(memo))
        twin._module = weakref.ref(copy.deepcopy(self.model, memo))
        twin.tower, twin._tree = self.tower, self._tree.of_copy()
        twin._begin()
        return twin

    def __reduce__(self) -> Any:
        return self.runtime.__reduce__()


def _grid_tables(graph: Graph) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of relative positions, by name."""
    shapes = weight_shapes(graph)
    return {name: shapes[name] for node in graph.nodes if node.op == "grid_queries" for name in node.weights}


def _resized(table: torch.Tensor, rows: int) -> torch.Tensor:
    """A parameter of relative positions for another number of distances, as Transformers resizes it."""
    if len(table) == rows:
        return table
    return F.interpolate(table.T[None], size=rows, mode="linear")[0].T.contiguous()


def _batch(x: torch.Tensor, part: slice, lengths: list[int], patches: Patches) -> Any:
    """A step over some of the rows, which belong to so many sequences."""
    count = part.stop - part.start
    positions = np.zeros(count, np.int32) if patches.positions is None else np.ascontiguousarray(patches.positions[part])
    batch = step_batch(x[part], positions, lengths, hidden=False)
    if patches.axes is not None:
        batch.axes = np.ascontiguousarray(patches.axes[part])
    return batch


def _overlaps(starts: list[int], part: slice) -> Iterator[tuple[int, int, int]]:
    """For each picture with rows in this part its number, its first row in it counted from its own first, and how many."""
    for picture, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        first, last = max(start, part.start), min(end, part.stop)
        if first < last:
            yield picture, first - start, last - first


def _last_rows(inside: list[tuple[int, int, int]], sees: Int32) -> Iterator[tuple[int, int, int]]:
    """The rows of a part as the last ones that they see, in sequences of at most as many rows: for each its picture, the number
    of rows before it, and its own.

    Args:
        inside: from `_overlaps`.
        sees: of these rows.
    """
    begin = 0
    for picture, _, count in inside:
        end = begin + count
        while begin < end:
            stop = min(end, begin + int(sees[end - 1]))
            yield picture, int(sees[stop - 1]) - (stop - begin), stop - begin
            begin = stop


def _writes(tensor: torch.Tensor) -> int:
    """Changes when the tensor is written to."""
    return 0 if tensor.is_inference() else tensor._version
