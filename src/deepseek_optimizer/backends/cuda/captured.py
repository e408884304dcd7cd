"""Steps that are captured once and then replayed: one call of the driver instead of hundreds of launches."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch

from ...errors import BackendError, NotEnoughMemoryError
from .buckets import Bucket
from .device import Device
from .division import DEFAULT, Division
from .step import DeviceStep, StepIntegers
from .store import DeviceBlocks

MOST_CAPTURED = 64  # of a cache; the least recently used is dropped


@dataclass
class Results:
    """What a step computes.

    Attributes:
        logits: [R, V].
        hidden: the hidden states that were asked for, by index.
        drafts: the draft states, if the graph returns them apart.
        greedy: int32 [R], the likeliest tokens (`reference.device_choice.greedy_tokens`).
        held: further memory whose address kernels were given.
    """

    logits: torch.Tensor
    hidden: dict[int, torch.Tensor]
    drafts: torch.Tensor | None = None
    greedy: torch.Tensor | None = None
    held: tuple[torch.Tensor, ...] = ()


# A step in pieces: each is launched by asking for the next item, and followed by what the host does. Most steps are one piece.
Pieces = Generator[Sequence[Callable[[], None]], None, Results]


def launched(pieces: Pieces) -> Results:
    """Launches a step, with what the host does between its pieces."""
    while True:
        try:
            actions = next(pieces)
        except StopIteration as end:
            results: Results = end.value
            return results
        for act in actions:
            act()


@dataclass
class _Step:
    """A bucket that has been used.

    Attributes:
        memory: the integers on the device, always at this address.
        replay: launches everything again; None: nothing is captured yet.
    """

    memory: torch.Tensor
    replay: Callable[[], None] | None = None
    results: Results | None = None


@dataclass
class _OfStore:
    """The steps of a cache while it is at one address."""

    address: tuple[int, ...]
    steps: OrderedDict[Bucket, _Step] = field(default_factory=OrderedDict)


class CapturedSteps:
    """Runs padded steps. The first step of a bucket is launched as usual, which compiles kernels and allocates buffers; the
    second is captured; this and all later ones are replayed. A bucket that occurs only once is never captured.

    Captured steps contain the cache's address, so they end with the memory of the cache.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stores: weakref.WeakKeyDictionary[DeviceBlocks, _OfStore] = weakref.WeakKeyDictionary()

    def run(
        self,
        integers: StepIntegers,
        store: DeviceBlocks,
        upload: Callable[[StepIntegers, torch.Tensor], None],
        launch: Callable[[DeviceStep], Pieces],
        further: tuple[int, ...] = (),
        division: Division = DEFAULT,
    ) -> Results:
        """Runs a step.

        Args:
            integers: of the step, padded.
            store: the cache, whose memory is allocated.
            upload: begins to copy integers to memory of the device.
            launch: launches the step's kernels. What it launches may depend on the bucket only, and on `further`. Each piece is
                captured for itself; what the host does between them is not, and is done in every step.
            further: addresses besides the cache's that kernels are given. Captured steps end when they change.
            division: of the plan.

        Returns: the results with the padding rows, valid until the next step.
        """
        step = self._step(integers, store, further)
        upload(integers, step.memory)
        if step.results is None:
            step.results = launched(launch(integers.on(step.memory, division)))
            return step.results
        if step.replay is None:
            step.replay, step.results = self._captured(launch(integers.on(step.memory, division)))
        step.replay()
        return step.results

    def buckets(self, store: DeviceBlocks) -> tuple[Bucket, ...]:
        """What has been captured for a cache."""
        held = self._stores.get(store)
        return tuple(bucket for bucket, step in held.steps.items() if step.replay is not None) if held else ()

    def _step(self, integers: StepIntegers, store: DeviceBlocks, further: tuple[int, ...]) -> _Step:
        address = (*store.address, *further)
        held = self._stores.get(store)
        if held is None or held.address != address:
            held = self._stores[store] = _OfStore(address)
        bucket, steps = integers.bucket, held.steps
        if bucket not in steps:
            with torch.inference_mode(False):  # later steps may write to it outside of inference mode
                steps[bucket] = _Step(torch.empty(integers.size, dtype=torch.int32, device=store.data.device))
            if len(steps) > MOST_CAPTURED:
                steps.popitem(last=False)
        steps.move_to_end(bucket)
        return steps[bucket]

    def _captured(self, pieces: Pieces) -> tuple[Callable[[], None], Results]:
        made: list[Results] = []
        acts: list[Callable[[], None]] = []

        def piece() -> None:
            try:
                between.extend(next(pieces))
            except StopIteration as end:
                made.append(end.value)

        while not made:
            between: list[Callable[[], None]] = []
            try:
                acts.append(self._device.capture(piece))
            except (torch.OutOfMemoryError, NotEnoughMemoryError):
                raise
            except RuntimeError as error:
                raise BackendError(
                    f"a step cannot be captured as a CUDA graph ({error}); load the model with cuda_graphs=False"
                ) from error
            acts += between
        if len(acts) == 1:
            return acts[0], made[0]

        def replay() -> None:
            for act in acts:
                act()

        return replay, made[0]
