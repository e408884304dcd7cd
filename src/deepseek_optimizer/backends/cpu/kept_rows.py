"""Results of norms in the kinds of rows that products read, converted once for all products of the same result.

Queries, keys and values are three products of one tensor, and the keys and values of all layers that attend to an encoder are
products of its last norm. Converting 2,048 rows takes a tenth of the time of a product of 768 columns: they come from memory.

Rows are used as long as the tensor is unchanged. Its version tells, as for tensors that torch's autograd saves, and as there
it does not count what is written through `Tensor.data` or numpy. Another tensor assigned to `Tensor.data` is noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_SMALLEST = 1 << 18  # elements, below which a second call takes as long as it saves


class KeptRows:
    """Rows by tensor and kind; they are dropped with the tensor, or by `clear`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drops all rows. Call between forwards: the caller may keep a result for longer."""
        self._of: Any = WeakTensorKeyDictionary()

    def expect(self, x: torch.Tensor) -> None:
        """Call for a result that products will read; those of inference mode have no version, and are not kept."""
        if x.numel() >= _SMALLEST and not x.is_inference():
            self._of[x] = {}

    def of(
        self, x: torch.Tensor, kind: str, shape: tuple[int, ...], convert: Callable[[], torch.Tensor]
    ) -> torch.Tensor | None:
        """The rows of an expected tensor; None for others.

        Args:
            x: the tensor.
            kind: what the product reads.
            shape: number and width of the rows.
            convert: makes the rows, if there are none of x as it is now.
        """
        if x.numel() < _SMALLEST or (kept := self._of.get(x)) is None:
            return None
        now = x._version, x.data_ptr(), x.stride()
        before, rows = kept.get((kind, shape), (None, None))
        if before != now:
            rows = convert()
            kept[kind, shape] = now, rows
        return rows
