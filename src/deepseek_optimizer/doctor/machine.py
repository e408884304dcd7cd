"""What checks read outside the model: system files, environment, CPUs, memory, installed packages.

Checks read all of it through a `Machine`, so that a test can simulate any machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ..system.files import ROOT, read_text
from ..system.memory import FreeMemory, Limit, free_memory

PACKAGES = (
    "deepseek-optimizer", "torch", "transformers", "accelerate", "numpy", "safetensors", "gguf", "tokenizers",
    "huggingface-hub", "torchvision", "torchaudio", "triton", "peft",
)  # fmt: skip


@dataclass(frozen=True)
class Package:
    """An installed distribution: its version, and the requirements in its metadata."""

    version: str
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """Attributes:
    environ: environment variables.
    root: directory that system files are read below; tests use their own.
    usable_cpus, online_cpus: CPUs that this process may run on, and all CPUs of the system.
    usable_cores: cores that these CPUs belong to, of which hyper-threads share one; None without the native library.
    memory: free memory and every limit on it.
    load: load average of the last minute; None if unknown.
    packages: installed distributions by name.
    """

    environ: Mapping[str, str]
    root: Path = ROOT
    usable_cpus: int = 1
    online_cpus: int = 1
    usable_cores: int | None = None
    memory: FreeMemory = FreeMemory((Limit("machine", "this machine", "memory", 0, 0),))
    load: float | None = None
    packages: Mapping[str, Package] = field(default_factory=dict)

    @classmethod
    def here(cls, *, for_model: bool = False) -> Machine:
        """The machine that this process runs on, as it is now.

        Args:
            for_model: first import what loading a model imports, so that the free memory is right.
        """
        if for_model:
            import transformers.modeling_utils  # noqa: F401

        from ..backends.cpu.native import machine_cpus, unavailable_reason
        from ..bench.hardware import usable_cpus

        return cls(
            environ=dict(os.environ),
            usable_cpus=usable_cpus(),
            online_cpus=os.cpu_count() or 1,
            usable_cores=None if unavailable_reason() else len({cpu.core for cpu in machine_cpus()}),
            memory=free_memory(),
            load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            packages=dict(installed(PACKAGES)),
        )

    def read(self, path: str) -> str:
        """The stripped text of a system file; "" if it cannot be read."""
        return read_text(self.root, path)


def installed(names: tuple[str, ...]) -> Iterator[tuple[str, Package]]:
    """(name, package) for each of `names` that is installed."""
    for name in names:
        try:
            metadata = distribution(name)
        except PackageNotFoundError:
            continue
        yield name, Package(metadata.version, tuple(metadata.requires or ()))
