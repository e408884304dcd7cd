"""Transformers itself, in bf16: the installed release, which the optimized model is also based on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..work import Work
from .base import check_directory, own_command


class Transformers:
    name = "transformers"
    requirements: Sequence[str] = ()
    unwanted: Sequence[str] = ()
    environment: dict[str, str] = {}

    def command(self, python: Path, model: Path, work: Work, *, threads: int, repeats: int, warmup: int) -> list[str]:
        if model.suffix != ".gguf":
            check_directory(self.name, model)
        return own_command("transformers", model, work, threads=threads, repeats=repeats, warmup=warmup)
