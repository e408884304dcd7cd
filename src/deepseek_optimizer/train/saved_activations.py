"""Selective recomputation: some results are recomputed in the backward pass instead of being saved."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Compute = Callable[[], torch.Tensor]


@dataclass
class _Recomputation:
    """Recomputes a tensor, once for all operations that saved it: their backward steps follow each other."""

    compute: Compute
    savers: int = 0
    _result: torch.Tensor | None = None
    _uses_left: int = 0

    def get(self) -> torch.Tensor:
        if self._result is None:
            self._result, self._uses_left = self.compute(), self.savers
        result, self._uses_left = self._result, self._uses_left - 1
        if self._uses_left <= 0:
            self._result = None
        return result


@dataclass(frozen=True)
class _Mark:
    """A tensor that can be recomputed, and its version (the number of in-place changes) when it was marked."""

    result: weakref.ref[torch.Tensor]
    version: int
    recomputation: _Recomputation


@dataclass(frozen=True)
class _Saved:
    """Saved in the autograd graph instead of a tensor: how to recompute it, and its shape."""

    recomputation: _Recomputation
    shape: torch.Size


class SavedActivations:
    """Decides which activations autograd saves. Modules mark results that are cheap to recompute; an operation that would save
    a marked result saves the function that recomputes it instead.

        with saved:
            y = saved.recomputable(rms_norm(x, w), partial(rms_norm, x.detach(), w.detach()))
            loss = linear(y, v).sum()   # saves x and w rather than y

    Implemented with `torch.autograd.graph.saved_tensors_hooks`, so it also covers adapters and other modules without support
    for it.

    Args:
        save_all: save all results; recompute nothing.
    """

    def __init__(self, save_all: bool = False) -> None:
        self.save_all = save_all
        self._marked: dict[int, _Mark] = {}
        self._hooks: list[Any] = []

    def recomputable(self, result: torch.Tensor, compute: Compute) -> torch.Tensor:
        """Marks `result` as recomputable and returns it.

        Args:
            compute: returns the same values, bit for bit, from tensors that are saved anyway.
        """
        if self._hooks and not self.save_all and result.requires_grad and result.is_contiguous():
            place = result.data_ptr()
            self._marked[place] = _Mark(
                weakref.ref(result, partial(self._gone, place)), result._version, _Recomputation(compute)
            )
        return result

    def keep(self, result: torch.Tensor) -> None:
        """Takes back the mark of a result, if it has one: what it is recomputed from may be gone when it is needed."""
        self._marked.pop(result.data_ptr(), None)

    def _gone(self, place: int, result: weakref.ref[torch.Tensor]) -> None:
        """Drops the mark of a result that was freed without being saved; under checkpointing, that is every result."""
        if place in self._marked and self._marked[place].result is result:
            del self._marked[place]

    def __enter__(self) -> SavedActivations:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._hooks.append(hooks)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.pop().__exit__(*error)
        self._marked.clear()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        recomputation = self._recomputation_of(tensor)
        if recomputation is None:
            # An operation that saves its own result would keep itself alive by it: for ever, if no backward pass reaches it.
            return tensor.detach()
        recomputation.savers += 1
        return _Saved(recomputation, tensor.shape)

    def _recomputation_of(self, tensor: torch.Tensor) -> _Recomputation | None:
        """How to recompute a tensor that an operation saves; None if it is not marked."""
        mark = self._marked.get(tensor.data_ptr())
        if mark is None:
            return None
        marked = mark.result()
        # the memory of a marked tensor that was freed may belong to another tensor now
        if marked is None or marked.numel() != tensor.numel() or marked.dtype != tensor.dtype or not tensor.is_contiguous():
            return None
        unchanged = tensor._version == mark.version  # otherwise recomputation would differ
        return mark.recomputation if unchanged else None

    @staticmethod
    def _unpack(packed: torch.Tensor | _Saved) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        with torch.no_grad():
            return packed.recomputation.get().view(packed.shape)
