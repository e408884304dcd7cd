"""llama.cpp on a CUDA card as a side of `benchmarks.gpu`, through the C interface of llama-cpp-python. Not run yet: there was
no card.

Sequences share one context, and a step decodes one token of each, as llama-server does. Flash attention is on. The tokens
chosen are the largest logits, which llama.cpp copies to the host.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from deepseek_optimizer.errors import ConfigError

CHUNK = 512  # tokens of prompts in a call of llama_decode
_EVERY_LAYER = 999


class LlamaCpp:
    """A model in a GGUF file, with all layers on the card.

    Args:
        path: the file.
        sequences, tokens: the most sequences of a call of `generate`, and the most tokens of each, prompt and text together.
        library: the module `llama_cpp`; None: it is imported.

    Raises:
        ConfigError: llama.cpp is built without CUDA, or cannot load the file or create the context.
    """

    def __init__(self, path: str, sequences: int, tokens: int, library: Any = None) -> None:
        if library is None:
            library = importlib.import_module("llama_cpp")
        self._lib = L = library
        if not L.llama_supports_gpu_offload():
            raise ConfigError(
                "llama-cpp-python is built for the CPU; build it for the card: "
                "CMAKE_ARGS=-DGGML_CUDA=on pip install --no-binary=llama-cpp-python llama-cpp-python"
            )
        options = L.llama_model_default_params()
        options.n_gpu_layers = _EVERY_LAYER
        self._model = L.llama_model_load_from_file(path.encode(), options)
        if not self._model:
            raise ConfigError(f"llama.cpp cannot load {path}; give a .gguf file with --gguf FORMAT=FILE")
        context = L.llama_context_default_params()
        context.n_ctx = sequences * (-(-tokens // 256) * 256)
        context.n_batch = context.n_ubatch = max(CHUNK, sequences)
        context.n_seq_max = sequences
        context.flash_attn_type = L.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = L.llama_init_from_model(self._model, context)
        if not self._context:
            raise ConfigError(f"llama.cpp cannot create a context of {context.n_ctx} tokens; use smaller --batches or --prompt")
        self._vocabulary = L.llama_vocab_n_tokens(L.llama_model_get_vocab(self._model))
        self._batch = L.llama_batch_init(context.n_batch, 0, 1)

    def generate(self, prompts: list[list[int]], tokens: int) -> None:
        """See `gpu.Side`."""
        L = self._lib
        L.llama_memory_clear(L.llama_get_memory(self._context), True)
        chosen = [self._read(sequence, ids) for sequence, ids in enumerate(prompts)]
        for step in range(tokens - 1):
            rows = [(token, len(prompts[s]) + step, s, True) for s, token in enumerate(chosen)]
            self._decode(rows)
            chosen = [self._largest(row) for row in range(len(rows))]

    def close(self) -> None:
        """Frees the card's memory, which llama.cpp holds until it is told to."""
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def _read(self, sequence: int, ids: list[int]) -> int:
        """Processes a prompt in chunks, and returns the token that follows it."""
        rows: list[tuple[int, int, int, bool]] = []
        for begin in range(0, len(ids), CHUNK):
            part = enumerate(ids[begin : begin + CHUNK], begin)
            rows = [(token, place, sequence, place == len(ids) - 1) for place, token in part]
            self._decode(rows)
        return self._largest(len(rows) - 1)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted) a row."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if self._lib.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")

    def _largest(self, row: int) -> int:
        import numpy as np

        logits = self._lib.llama_get_logits_ith(self._context, row)  # waits for the card
        values = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.argmax(np.ctypeslib.as_array(values, (self._vocabulary,))))


def files_of(given: list[str]) -> dict[str, str]:
    """The option --gguf: FORMAT=FILE, by format. Raises ConfigError."""
    found = {}
    for one in given:
        name, _, path = one.partition("=")
        if not path:
            raise ConfigError(f"--gguf {one}: must be FORMAT=FILE, such as int4=model-Q4_0.gguf")
        found[name] = path
    return found


def side_of(
    files: Mapping[str, str], format_name: str, has: Callable[[str], object], sequences: int, tokens: int
) -> dict[str, Callable[[], LlamaCpp]]:
    """How to create the side, if there is a file for this format; nothing otherwise.

    Args:
        files: of `files_of`.
        has: whether a package is installed, such as `importlib.util.find_spec`.
        sequences, tokens: see `LlamaCpp`.

    Raises:
        ConfigError: a file is given, but llama-cpp-python is not installed.
    """
    path = files.get(format_name)
    if path is None:
        return {}
    if has("llama_cpp") is None:
        raise ConfigError("--gguf needs llama-cpp-python: CMAKE_ARGS=-DGGML_CUDA=on pip install llama-cpp-python")
    return {"llama.cpp": lambda: LlamaCpp(path, sequences, tokens)}
