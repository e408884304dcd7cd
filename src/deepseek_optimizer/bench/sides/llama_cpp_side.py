"""llama.cpp as a side, through llama-cpp-python's C interface; run by the interpreter of its own environment:

    PEER/bin/python llama_cpp_side.py MODEL.gguf --prompt 512 --new 64 --threads 2

Sequences share one context, and a step decodes one token of each, as llama-server does. Flash attention is on. The token
chosen is the largest logit, as greedy `generate` chooses on the other side.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import time
from typing import Any

from foreign import main, resident

CHUNK = 512  # tokens a llama_decode call takes in prefill


def measure(a: argparse.Namespace) -> dict[str, Any]:
    import llama_cpp as L
    import numpy as np

    base, started = resident("VmRSS"), time.perf_counter()
    model = L.llama_model_load_from_file(a.model.encode(), L.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {a.model}")
    options = L.llama_context_default_params()
    options.n_ctx = a.batch * (-(-(a.depth + a.prompt + a.new) // 256) * 256)
    options.n_batch = options.n_ubatch = CHUNK
    options.n_seq_max = a.batch
    options.n_threads = options.n_threads_batch = a.threads
    options.flash_attn_type = L.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = L.llama_init_from_model(model, options)
    if not context:
        raise SystemExit("llama.cpp cannot create a context of this size")
    load_s = time.perf_counter() - started
    vocabulary = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
    batch = L.llama_batch_init(max(CHUNK, a.batch), 0, 1)
    memory = L.llama_get_memory(context)

    def decode(rows: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted) a row."""
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if L.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")

    def chosen(row: int) -> int:
        logits = L.llama_get_logits_ith(context, row)
        return int(np.argmax(np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (vocabulary,))))

    def read(sequence: int, begin: int, count: int) -> int:
        """Random tokens from position `begin` on; the token that follows them."""
        rows: list[tuple[int, int, int, bool]] = []
        for done in range(0, count, CHUNK):
            places = range(begin + done, begin + min(done + CHUNK, count))
            rows = [(random.randrange(10, vocabulary), p, sequence, p == begin + count - 1) for p in places]
            decode(rows)
        return chosen(len(rows) - 1)

    def run() -> dict[str, Any]:
        for sequence in range(a.batch):
            L.llama_memory_seq_rm(memory, sequence, a.depth, -1)
        begin, times = time.perf_counter(), []
        tokens = [read(sequence, a.depth, a.prompt) for sequence in range(a.batch)]
        times.append(time.perf_counter() - begin)
        for step in range(a.new - 1):
            decode([(token, a.depth + a.prompt + step, s, True) for s, token in enumerate(tokens)])
            tokens = [chosen(row) for row in range(a.batch)]
            times.append(time.perf_counter() - begin)
        return {"prompt": a.prompt, "batch": a.batch, "times": times, "generated": a.batch * a.new}

    random.seed(0)
    read(0, 0, 16)
    to_first_token_s = time.perf_counter() - started
    L.llama_memory_clear(memory, True)
    for sequence in range(a.batch if a.depth else 0):
        read(sequence, 0, a.depth)
    runs = [run() for _ in range(a.warmup + a.repeats)][a.warmup :]
    memory_bytes = resident("VmHWM") - base
    return {"load_s": load_s, "to_first_token_s": to_first_token_s, "memory_bytes": memory_bytes, "runs": runs}


if __name__ == "__main__":
    main(measure)
