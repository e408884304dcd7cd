"""What checks look at outside the model: files of the system, environment, processors, memory, installed packages.

Everything comes through a `Machine`, so that a test can show a check any machine there is.
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
    """An installed distribution: its version, and what its metadata says it needs."""

    version: str
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """Attributes:
    environ: environment variables.
    root: where the system's files lie; tests put their own there.
    usable_cpus, online_cpus: processors that this process may run on, and all that the system has.
    physical_cores: processors without their hyper-threads; None where the system doesn't tell.
    memory: that can still be taken, and every limit of it.
    load: processes that wanted to run, on average over the last minute; None where the system doesn't tell.
    packages: installed distributions by name.
    """

    environ: Mapping[str, str]
    root: Path = ROOT
    usable_cpus: int = 1
    online_cpus: int = 1
    physical_cores: int | None = None
    memory: FreeMemory = FreeMemory((Limit("machine", "this machine", "memory", 0, 0),))
    load: float | None = None
    packages: Mapping[str, Package] = field(default_factory=dict)

    @classmethod
    def here(cls, *, for_model: bool = False) -> Machine:
        """The machine this process is on, as it is now.

        Args:
            for_model: imports what loading a model does before memory is measured.
        """
        import psutil

        if for_model:
            import transformers.modeling_utils  # noqa: F401

        from ..bench.process import usable_cpus

        return cls(
            environ=dict(os.environ),
            usable_cpus=usable_cpus(),
            online_cpus=os.cpu_count() or 1,
            physical_cores=psutil.cpu_count(logical=False),
            memory=free_memory(),
            load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            packages=dict(installed(PACKAGES)),
        )

    def read(self, path: str) -> str:
        """A system file's text without white space around it; "" where it can't be read."""
        return read_text(self.root, path)


def installed(names: tuple[str, ...]) -> Iterator[tuple[str, Package]]:
    """Those of `names` that are installed."""
    for name in names:
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        yield name, Package(found.version, tuple(found.requires or ()))
