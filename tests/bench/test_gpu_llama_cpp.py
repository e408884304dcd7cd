"""llama.cpp as a side of `make bench-gpu`, with a library that records what it is asked to decode."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
from benchmarks import gpu_llama_cpp
from benchmarks.gpu_llama_cpp import LlamaCpp, files_of, side_of

from deepseek_optimizer.errors import ConfigError

VOCABULARY = 50


class _Library:
    """After a token t at position p, the largest logit is that of (t + p) % VOCABULARY."""

    LLAMA_FLASH_ATTN_TYPE_ENABLED = 1

    def __init__(self, cuda=True, loads=True):
        self.cuda, self.loads, self.calls, self.freed, self._rows = cuda, loads, [], [], []

    def llama_supports_gpu_offload(self):
        return self.cuda

    def llama_model_default_params(self):
        return SimpleNamespace()

    def llama_context_default_params(self):
        return SimpleNamespace()

    def llama_model_load_from_file(self, path, options):
        assert isinstance(path, bytes) and options.n_gpu_layers > 100
        return "model" if self.loads else None

    def llama_init_from_model(self, model, options):
        self.options = options
        return "context"

    def llama_model_get_vocab(self, model):
        return "vocabulary"

    def llama_vocab_n_tokens(self, vocabulary):
        return VOCABULARY

    def llama_batch_init(self, size, embedding, sequences):
        own = [0] * size
        return SimpleNamespace(
            n_tokens=0, token=own.copy(), pos=own.copy(), n_seq_id=own.copy(), seq_id=[[0] for _ in own], logits=own.copy()
        )

    def llama_get_memory(self, context):
        return "memory"

    def llama_memory_clear(self, memory, data):
        self.calls.append("clear")

    def llama_decode(self, context, b):
        self._rows = [(b.token[i], b.pos[i], b.seq_id[i][0], b.logits[i]) for i in range(b.n_tokens)]
        self.calls.append(self._rows)
        return 0

    def llama_get_logits_ith(self, context, row):
        token, position, _, wanted = self._rows[row]
        assert wanted
        self.values = (ctypes.c_float * VOCABULARY)()
        self.values[(token + position) % VOCABULARY] = 1.0
        return ctypes.cast(self.values, ctypes.c_void_p)

    def llama_batch_free(self, batch):
        self.freed.append("batch")

    def llama_free(self, context):
        self.freed.append(context)

    def llama_model_free(self, model):
        self.freed.append(model)


def test_prompts_are_read_in_chunks_and_then_all_sequences_decode_together(monkeypatch):
    monkeypatch.setattr(gpu_llama_cpp, "CHUNK", 3)
    library = _Library()
    side = LlamaCpp("model.gguf", sequences=2, tokens=300, library=library)
    assert library.options.n_ctx == 2 * 512 and library.options.n_seq_max == 2
    side.generate([[1, 2, 3, 4], [5, 6]], tokens=3)
    assert library.calls == [
        "clear",
        [(1, 0, 0, False), (2, 1, 0, False), (3, 2, 0, False)],
        [(4, 3, 0, True)],
        [(5, 0, 1, False), (6, 1, 1, True)],
        [(7, 4, 0, True), (7, 2, 1, True)],
        [(11, 5, 0, True), (9, 3, 1, True)],
    ]
    side.close()
    assert library.freed == ["batch", "context", "model"]


def test_a_build_for_the_cpu_and_a_file_that_does_not_load():
    with pytest.raises(ConfigError, match="built for the CPU; .*GGML_CUDA=on"):
        LlamaCpp("model.gguf", 1, 8, library=_Library(cuda=False))
    with pytest.raises(ConfigError, match="cannot load model.gguf"):
        LlamaCpp("model.gguf", 1, 8, library=_Library(loads=False))


def test_it_runs_beside_the_formats_that_files_are_given_for():
    files = files_of(["int4=a.gguf", "bf16=b=c.gguf"])
    assert files == {"int4": "a.gguf", "bf16": "b=c.gguf"}
    assert set(side_of(files, "int4", lambda package: True, 1, 8)) == {"llama.cpp"}
    assert side_of(files, "int8", lambda package: None, 1, 8) == {}
    with pytest.raises(ConfigError, match="--gguf needs llama-cpp-python"):
        side_of(files, "int4", lambda package: None, 1, 8)
    with pytest.raises(ConfigError, match="--gguf a.gguf: must be FORMAT=FILE"):
        files_of(["a.gguf"])
