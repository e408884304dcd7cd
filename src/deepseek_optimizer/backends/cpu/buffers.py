"""Memory passed to the native library. Every pointer is created here, from a tensor or an array whose dtype, shape and layout
were checked: the library only sees an address, and would read or write past the end of anything else.

With DSO_CHECK=1, for tests, the library's outputs also have red zones: `Outputs` allocates them and checks the zones after each
call.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
import torch

from ...errors import BackendError
from ...system.tensor_memory import TensorMemory

ZONE: Final = 64  # bytes before and after a checked buffer; equal to the allocator's alignment
_SEGMENT: Final = 32 << 20  # bytes of memory for short-lived tensors that are mapped at once
_KEPT: Final = 256 << 20  # bytes of it that are kept between forwards
_PATTERN: Final = bytes([0xC3]) * ZONE
Memory = torch.Tensor | np.ndarray[Any, Any]


def address(memory: Memory, name: str, dtype: Any, shape: tuple[int, ...]) -> int:
    """The address of contiguous CPU memory with this dtype and shape; the caller keeps it alive during the call.

    Args:
        memory: the tensor or array.
        name: its name in the error.
        dtype: torch's for a tensor, numpy's for an array.
        shape: the required shape.

    Raises:
        ValueError: the memory has another dtype, shape, layout or device.
    """
    if isinstance(memory, np.ndarray):
        kind = memory.dtype
        if (kind is not dtype and kind != dtype) or memory.shape != shape or not memory.flags.c_contiguous:
            raise _unfit(memory, name, "contiguous", dtype, shape)
        return int(memory.__array_interface__["data"][0])  # takes a third of the time of `.ctypes`
    if memory.dtype is not dtype or memory.shape != shape or not memory.is_cpu or not memory.is_contiguous():
        raise _unfit(memory, name, "contiguous", dtype, shape)
    return memory.data_ptr()


def optional(memory: Memory | None, name: str, dtype: Any, shape: tuple[int, ...]) -> int | None:
    """`address`, or NULL for None."""
    return None if memory is None else address(memory, name, dtype, shape)


def strided(tensor: torch.Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """`address` for a tensor with any strides, of which only the last dimension must be contiguous."""
    fits = tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu
    if not fits or (shape[-1] > 1 and tensor.stride(-1) != 1 and tensor.numel()):
        raise _unfit(tensor, name, "dense rows of", dtype, shape)
    return tensor.data_ptr()


def _unfit(memory: Memory, name: str, layout: str, dtype: Any, shape: Iterable[int]) -> ValueError:
    if isinstance(memory, torch.Tensor):
        dense, device = memory.is_contiguous(), memory.device.type
    else:
        dense, device = memory.flags.c_contiguous, "cpu"
    actual = (
        f"{'' if dense else 'strided '}{_name(memory.dtype)} {list(memory.shape)}{'' if device == 'cpu' else f' on {device}'}"
    )
    return ValueError(f"{name} must be {layout} {_name(dtype)} {list(shape)} on the CPU, and is {actual}")


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else np.dtype(dtype).name


class Outputs:
    """Allocates the tensors that the library writes to.

    Args:
        checked: whether to add red zones before and after each, for `verify`.
    """

    def __init__(self, checked: bool) -> None:
        self.checked = checked
        self._short_lived = TensorMemory("results of layers", "process less at once", segment=_SEGMENT, returns=False)
        self._zones: dict[int, tuple[memoryview, int, int]] = {}  # address -> surrounding memory, offset in it, bytes

    def empty(self, shape: Iterable[int], dtype: torch.dtype, *, short_lived: bool = False) -> torch.Tensor:
        """An uninitialized tensor on the CPU.

        Args:
            short_lived: others like it are needed soon, so that its memory, if it is large, is kept for them until `trim`. The
                C library would return it to the system, which clears the pages of every new tensor: for models whose layers
                are called one by one, that takes up to a fifth of the time of a forward.
        """
        shape = torch.Size(shape)
        size = shape.numel() * dtype.itemsize
        if short_lived and not self.checked:
            return self._short_lived.empty(shape, dtype)
        if not self.checked or not size:
            return torch.empty(shape, dtype=dtype, device="cpu")
        array = np.empty(size + 3 * ZONE, np.uint8)
        start = ZONE + -array.__array_interface__["data"][0] % ZONE
        whole = array.data
        whole[start - ZONE : start] = whole[start + size : start + size + ZONE] = _PATTERN
        block = whole[start : start + size]  # lives as long as the tensor's storage
        tensor = torch.frombuffer(block, dtype=dtype, count=shape.numel()).view(shape)
        place = tensor.data_ptr()
        self._zones[place] = whole, start, size
        weakref.finalize(block, self._zones.pop, place, None)
        return tensor

    def trim(self) -> None:
        """Returns what is kept for short-lived tensors to the system, if it is much. Call between forwards."""
        if self._short_lived.held() > _KEPT:
            self._short_lived.trim()

    def verify(self, call: str, written: Mapping[str, torch.Tensor | None]) -> None:
        """Checks the red zones of a call's outputs; memory that was not allocated here has none.

        Args:
            call: name of the library's function.
            written: its outputs by name.

        Raises:
            BackendError: a red zone was overwritten; the message names the call, the buffer and the byte.
        """
        for name, tensor in written.items():
            if tensor is None or (zone := self._zones.get(tensor.data_ptr())) is None:
                continue
            whole, start, size = zone
            for begin, offset in ((start - ZONE, -ZONE), (start + size, size)):
                if whole[begin : begin + ZONE] != _PATTERN:
                    byte = next(i for i in range(ZONE) if whole[begin + i] != _PATTERN[i])
                    shape = f"{tensor.dtype} {list(tensor.shape)}, {size} bytes"
                    raise BackendError(f"{call} wrote outside {name} ({shape}): at byte {offset + byte}")


def checking() -> bool:
    """Whether DSO_CHECK=1 enables red zones. Read when a context is created."""
    return os.environ.get("DSO_CHECK") == "1"
