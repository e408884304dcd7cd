"""What the ops of training have in common on their way to the native library."""

from __future__ import annotations

import ctypes as C
import functools
from collections.abc import Iterable
from typing import Any

import torch

from ...backends.cpu import native
from ...backends.cpu.environment import forced_threads
from ...backends.cpu.native_train import TYPES, Matrix
from ...errors import BackendError
from .memory import memory

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def context() -> native.Context:
    """The process's threads, which the models that were loaded with default settings use too. They survive a fork: the library
    starts them anew in a child."""
    return native.shared_context(None, forced_threads())


@functools.cache
def built() -> bool:
    """Whether there is a native library that runs here. Without one every op takes its plain torch form."""
    return native.unavailable_reason() is None


def usable(*tensors: torch.Tensor | None) -> bool:
    """Whether the native form of an op takes these: all on the CPU, in bf16 or fp32."""
    return all(t is None or (t.device.type == "cpu" and t.dtype in _NATIVE_DTYPES) for t in tensors) and built()


def type_of(tensor: torch.Tensor) -> int:
    """DSO_TYPE_* of a tensor's numbers."""
    return TYPES[str(tensor.dtype).removeprefix("torch.")]


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's first number lies; NULL for None. The caller keeps the tensor alive over the call."""
    return None if tensor is None else tensor.data_ptr()


def new(shape: Iterable[int], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised tensor of a shape, of another's dtype (or `dtype`) and device; on the CPU where a step's tensors lie."""
    size, dtype = torch.Size(shape), dtype or like.dtype
    real = type(like) in (torch.Tensor, torch.nn.Parameter) and like.device.type == "cpu"  # not one that torch only traces
    return memory().empty(size, dtype) if real else torch.empty(size, dtype=dtype, device=like.device)


def rows(x: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [T, n] whose rows are numbers that lie together; a view where strides allow one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 and (len(flat) < 2 or flat.stride(0) >= flat.shape[1]) else flat.contiguous()


def matrix(x: torch.Tensor | None) -> Any:
    """The dso_train_matrix of what `rows` returned, to be passed by reference; NULL for None."""
    return None if x is None else C.byref(Matrix(x.data_ptr(), x.stride(0), 0, type_of(x), 0))


def call(name: str, *arguments: Any) -> None:
    """Runs a function of `dso_train.h` on the shared context. Raises BackendError."""
    made = context()
    try:
        native.check(getattr(made.lib, name)(made.handle, *arguments))
    except ValueError as error:  # the ops check what users can get wrong, so this is a defect of ours
        raise BackendError(f"{name}: {error}") from error
    except MemoryError as error:
        raise BackendError(f"{name}: {error}; take shorter sequences or fewer of them a step") from error
