"""llama.cpp, built from the source package of llama-cpp-python, for this CPU or for an instruction set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import ConfigError
from ..work import Work
from .base import arguments, script

_AVX2 = "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
_AVX512 = "-DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_BF16=ON"
BUILDS = {"llama.cpp": "-DGGML_NATIVE=ON", "llama.cpp-avx2": _AVX2, "llama.cpp-avx512": f"{_AVX2} {_AVX512}"}


class LlamaCpp:
    requirements: Sequence[str] = ("--no-cache-dir", "--no-binary=llama-cpp-python", "llama-cpp-python==0.3.36")
    unwanted: Sequence[str] = ()

    def __init__(self, name: str) -> None:
        """name: one of `BUILDS`."""
        self.name = name
        self.environment = {"CMAKE_ARGS": BUILDS[name]}

    def command(self, python: Path, model: Path, work: Work, *, threads: int, repeats: int, warmup: int) -> list[str]:
        if model.suffix != ".gguf":
            raise ConfigError(f"{self.name} needs a .gguf file, got {model}; give one with --peer-model {self.name}=FILE.gguf")
        options = arguments(work, threads=threads, repeats=repeats, warmup=warmup)
        return [str(python), script("llama_cpp_side.py"), str(model), *options]
