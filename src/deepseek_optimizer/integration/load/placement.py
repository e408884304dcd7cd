"""The device that a model is loaded to."""

from __future__ import annotations

from typing import Any

import torch

from ...backends.base import Backend
from ...backends.registry import choose_backend, find
from ...config import DeepSeekConfig
from ...errors import ConfigError
from ...system.backend_entries import AUTO
from ...system.cuda_device import why_no_cuda

CPU = torch.device("cpu")


def parse_device(device: Any) -> torch.device:
    """The device that a user names: a torch device or its name, or the number of a CUDA device (-1: the CPU).

    Raises:
        ConfigError: it is no device, or not available.
    """
    try:
        numbered = isinstance(device, int) and not isinstance(device, bool)
        parsed = torch.device("cpu" if device == -1 else f"cuda:{device}") if numbered else torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f'device={device!r} is not a device; use device="cpu"') from error
    if parsed.type == "cuda":
        if (reason := why_no_cuda()) is not None:
            raise ConfigError(f'device={device!r} is a CUDA device, but none is available; use device="cpu". {reason}')
        count, index = torch.cuda.device_count(), parsed.index or 0
        if index >= count:
            raise ConfigError(f'device={device!r}: there are {count} CUDA devices, numbered from 0; use device="cuda:0"')
        return torch.device("cuda", index)
    if parsed.type != "cpu":
        raise ConfigError(f'device={device!r} is not supported; use device="cpu"')
    return parsed


def target_of(backend: str, device: Any) -> torch.device:
    """The device that a model is loaded to.

    Args:
        backend: the name that the settings have.
        device: see `parse_device`; None: a device of this backend, or the CPU.

    Raises:
        ConfigError: see `parse_device`.
    """
    return parse_device(device_of(backend) if device is None else device)


def placed(settings: DeepSeekConfig, device: Any) -> tuple[DeepSeekConfig, torch.device]:
    """The device to load a model with a plan to, and the settings for it. On a CUDA device, backend "auto" becomes "cuda".

    Args:
        settings: the settings.
        device: see `parse_device`; None: a device of the backend that the settings name, otherwise the CPU.

    Raises:
        ConfigError: see `parse_device`.
        BackendError: the backend cannot run there.
    """
    parsed = target_of(settings.backend, device)
    if parsed.type == "cuda" and settings.backend == AUTO:
        settings = with_backend(settings, "cuda")
    if parsed.type != "cpu" or settings.backend != AUTO:
        choose_backend(settings, parsed)
    return settings, parsed


def with_backend(settings: DeepSeekConfig, backend: str) -> DeepSeekConfig:
    """The settings with another backend."""
    return DeepSeekConfig(**{**settings.to_dict(), "backend": backend})


def device_of(backend: str) -> str:
    """The type of device that a model is loaded to, unless another one is named: the CPU, if the backend runs there."""
    types = None if backend == AUTO else find(backend).device_types
    return "cpu" if types is None or "cpu" in types else types[0]


def packing_backend(settings: DeepSeekConfig) -> Backend:
    """The backend that packs weights on the host and maps files: that of the settings if it runs there. All pack the same
    bits."""
    if device_of(settings.backend) != "cpu":
        settings = with_backend(settings, AUTO)
    return choose_backend(settings, CPU)[0]
