"""llama.cpp, built for this very CPU out of llama-cpp-python's source on the package registry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import ConfigError
from ..work import Work
from .base import arguments, script


class LlamaCpp:
    name = "llama.cpp"
    requirements: Sequence[str] = ("--no-binary=llama-cpp-python", "llama-cpp-python==0.3.36")
    environment: dict[str, str] = {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}

    def command(self, python: Path, model: Path, work: Work, *, threads: int, repeats: int, warmup: int) -> list[str]:
        if model.suffix != ".gguf":
            raise ConfigError(f"llama.cpp reads .gguf files, not {model}; name one with --peer-model llama.cpp=FILE.gguf")
        options = arguments(work, threads=threads, repeats=repeats, warmup=warmup)
        return [str(python), script("llama_cpp_side.py"), str(model), *options]
