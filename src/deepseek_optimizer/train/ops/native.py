"""Calls of the native library, shared by the training ops."""

from __future__ import annotations

import ctypes as C
import functools
from collections.abc import Iterable
from typing import Any

import torch

from ...backends.cpu import native
from ...backends.cpu.buffers import address, strided
from ...backends.cpu.environment import forced_threads
from ...backends.cpu.native_train import TYPES, Matrix, TrainNumbers
from ...errors import BackendError
from ...system.tensor_memory import MIN_BYTES
from .memory import memory

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def context() -> native.Context:
    """The process-wide thread pool, shared with models loaded with default settings. After a fork, the library restarts it in
    the child."""
    return native.shared_context(None, forced_threads())


@functools.cache
def built() -> bool:
    """Whether the native library can be used here. Without it, every op uses plain torch."""
    return native.unavailable_reason() is None


def usable(*tensors: torch.Tensor | None) -> bool:
    """Whether a native op supports these tensors: all on the CPU, in bf16 or fp32."""
    return all(t is None or (t.device.type == "cpu" and t.dtype in _NATIVE_DTYPES) for t in tensors) and built()


def type_of(tensor: torch.Tensor) -> int:
    """The DSO_TYPE_* of a tensor's dtype."""
    return TYPES[str(tensor.dtype).removeprefix("torch.")]


def new(shape: Iterable[int], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialized tensor with the device of `like`; CPU tensors are allocated by `memory`.

    Args:
        dtype: None: that of `like`.
    """
    size, dtype = torch.Size(shape), dtype or like.dtype
    real = type(like) in (torch.Tensor, torch.nn.Parameter) and like.device.type == "cpu"  # not a tensor that torch only traces
    if not real:
        return torch.empty(size, dtype=dtype, device=like.device)
    if built() and context().outputs.checked and size.numel() * dtype.itemsize < MIN_BYTES:  # torch would allocate it
        return context().outputs.empty(size, dtype)
    return memory().empty(size, dtype)


def rows(x: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [T, n] with contiguous rows; a view if the strides allow one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 and (len(flat) < 2 or flat.stride(0) >= flat.shape[1]) else flat.contiguous()


def matrix(x: torch.Tensor | None, name: str, shape: Iterable[int] = ()) -> Any:
    """The dso_train_matrix of a result of `rows`, to be passed by reference; NULL for None.

    Args:
        name: the argument's name, for errors.
        shape: the shape that the call expects; default: that of x.
    """
    if x is None:
        return None
    place = strided(x, name, x.dtype, tuple(shape) or tuple(x.shape))
    return C.byref(Matrix(place, x.stride(0), 0, type_of(x), 0))


def numbers(x: torch.Tensor, name: str) -> TrainNumbers:
    """The dso_train_numbers of a contiguous tensor."""
    return TrainNumbers(address(x, name, x.dtype, x.shape), x.numel(), type_of(x), 0)


def call(name: str, *arguments: Any, **written: torch.Tensor | None) -> None:
    """Calls a function of `dso_train.h` on the shared context; `written`: see `Context.call`. Raises BackendError."""
    shared = context()
    try:
        shared.call(name, shared.handle, *arguments, **written)
    except ValueError as error:  # the ops validate user input, so this is a bug
        raise BackendError(f"{name}: {error}") from error
    except MemoryError as error:
        raise BackendError(f"{name}: {error}; use shorter sequences or a smaller batch") from error
