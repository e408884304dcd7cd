"""Routed experts that the CPU computes: their weights stay in the host's memory, and rows cross over pinned memory.

While the CPU computes a layer, the device runs what the graph has between the layer's router and the first reader of the
results, such as shared experts. It waits for the host only where it needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...errors import BackendError
from ...graph.ir import NO_CACHE
from ...quant.packed import PackedWeight
from ..base import DECODE, PREFILL, Backend, CompileOptions, Plan, StepBatch
from .device import Device
from .host_graph import HostLayer

Action = Callable[[], None]


class HostExperts:
    """The plans of some layers' experts on the CPU, and the memory that rows cross over. One layer is under way at a time.

    Args:
        layers: from `host_graph.divide`.
        weights: packed, in the host's memory; as in `Backend.compile`.
        backend: of the CPU.
        device: of the rest of the graph.
        options: of the whole plan.
    """

    def __init__(
        self,
        layers: Sequence[HostLayer],
        weights: Mapping[str, PackedWeight | torch.Tensor],
        backend: Backend,
        device: Device,
        options: CompileOptions,
    ) -> None:
        own = CompileOptions(options.activation)
        self._layers = {layer.weight: layer for layer in layers}
        self.plans: dict[str, Plan] = {
            layer.weight: backend.compile(layer.graph, _on_host(layer, weights), own) for layer in layers
        }
        self._device = device
        self._sent, self._results = device.staging(0), device.staging(0)
        self._rows = self._decoding = 0
        self._arrived: Callable[[], None] | None = None

    def begin(self, batch: StepBatch) -> None:
        """Call before a step. Padding rows are not computed."""
        self._rows, self._decoding = len(batch.positions), batch.decoding_rows

    def reserve(self, rows: int) -> None:
        """Allocates memory for steps of up to `rows` rows, of the rows that cross and of the plans."""
        self._grow(rows)
        for plan in self.plans.values():
            plan.reserve(rows, 0)

    def send(self, sent: torch.Tensor) -> Action:
        """What the host does when the device has been asked for a layer's rows: begins to copy them.

        Args:
            sent: [T or more, width + 2 * top_k] on the device.
        """

        def begin_copy() -> None:
            rows = self._rows
            self._grow(len(sent))
            self._device.download(sent[:rows], _floats(self._sent, rows, sent.shape[1]))
            self._arrived = self._device.mark()

        return begin_copy

    def receive(self, weight: str, result: torch.Tensor) -> Action:
        """What the host does where the device needs the results: computes them, and begins to copy them.

        Args:
            weight: of the layer.
            result: [T or more, width] on the device. Rows after those of the step become zero.
        """
        plan, layer = self.plans[weight], self._layers[weight]

        def compute() -> None:
            rows = self._rows
            assert self._arrived is not None  # `send` comes before it
            self._arrived()
            batch = _batch(rows, self._decoding, _floats(self._sent, rows, layer.graph.hidden_size))
            made = plan.run(batch, None).last_hidden
            assert made is not None
            out = _floats(self._results, len(result), layer.width)
            out[:rows].copy_(made[:, : layer.width])
            out[rows:].zero_()
            self._device.upload(out, result)

        return compute

    def check_weights(self) -> None:
        """See `Plan.check_weights`."""
        for plan in self.plans.values():
            plan.check_weights()

    def describe(self, weight: str) -> dict[str, Any]:
        """The formats and the size of a layer's experts, for the report."""
        rows = [row for row in self.plans[weight].describe() if row.get("weights")]
        return {
            "weights": [name for row in rows for name in row["weights"]],
            "format": ",".join(dict.fromkeys(str(row["format"]) for row in rows)),
            "bytes": sum(row["bytes"] for row in rows),
        }

    def _grow(self, rows: int) -> None:
        width, result = (max(of) for of in zip(*((x.graph.hidden_size, x.width) for x in self._layers.values()), strict=True))
        if rows * width > len(self._sent):
            self._sent, self._results = self._device.staging(rows * width), self._device.staging(rows * result)


def _floats(staging: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """A view of the beginning of memory of `Device.staging`, float32 [rows, width]."""
    return staging[: rows * width].view(torch.float32).view(rows, width)


def _batch(rows: int, decoding: int, states: torch.Tensor) -> StepBatch:
    """A step without a cache, whose first `decoding` rows are in phase DECODE."""
    counts = [(count, phase) for count, phase in ((decoding, DECODE), (rows - decoding, PREFILL)) if count]
    lengths, phases = np.array(counts, np.int32).T.copy()
    none = np.zeros(rows, np.int32)
    table = np.zeros((NO_CACHE.groups, len(counts), 1), np.int32)
    return StepBatch(
        none, none, lengths, np.zeros_like(lengths), phases, table, np.zeros(0, np.int32), states=states, last_hidden=True
    )


def _on_host(layer: HostLayer, weights: Mapping[str, PackedWeight | torch.Tensor]) -> dict[str, PackedWeight | torch.Tensor]:
    """The weights of a layer. Biases may be on the device.

    Raises:
        BackendError: its experts are on a device.
    """
    held = {name: weights[name] for name in layer.graph.weights() if name in weights}
    for name, weight in held.items():
        if isinstance(weight, PackedWeight) and not weight.data.is_cpu:
            raise BackendError(
                f"{name!r} is to be computed on the CPU, but is on {weight.data.device}; move it to the host's memory"
            )
    return {name: weight.detach().cpu() if isinstance(weight, torch.Tensor) else weight for name, weight in held.items()}
