"""A card that is not there, for what is said before anything is computed on it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from deepseek_optimizer.backends import cuda

OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver."


def pretend(monkeypatch, *, triton=True, capability=(9, 0), free=80_000_000_000, build="13.0", failure=None):
    """Lets torch find one card.

    Args:
        triton: whether Triton is installed.
        capability: of the card.
        free: bytes of its memory that are free.
        build: the version of CUDA that torch is built for; None: a build for the CPU.
        failure: why torch finds no card; None: it finds one.
    """

    def init():
        if failure is not None:
            raise RuntimeError(failure)

    found = build is not None and failure is None
    monkeypatch.setattr(cuda, "find_spec", lambda name: SimpleNamespace() if triton else None)
    monkeypatch.setattr(torch.version, "cuda", build)
    for name, value in {
        "init": init,
        "is_available": lambda: found,
        "device_count": lambda: int(found),
        "get_device_capability": lambda device: capability,
        "get_device_name": lambda device: "a card",
        "get_device_properties": lambda device: SimpleNamespace(
            name="a card", major=capability[0], minor=capability[1], multi_processor_count=132
        ),
        "mem_get_info": lambda device: (free, 80_000_000_000),
        "memory_reserved": lambda device: 0,
        "memory_allocated": lambda device: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
