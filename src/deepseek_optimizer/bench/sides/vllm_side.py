"""vLLM's CPU build as a side, in bf16; run by the interpreter of its own environment:

    PEER/bin/python vllm_side.py MODEL --prompt 512 --new 64 --threads 2

The engine's scheduler runs in this process, so that each of its steps can be timed; its worker, which owns the threads, is a
process of its own. Sequences need not advance together: the time of a step is when the last of them has its token.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

from foreign import main


def measure(a: argparse.Namespace) -> dict[str, Any]:
    if a.depth:
        raise SystemExit("vllm cannot start with a filled cache")
    cores = sorted(os.sched_getaffinity(0))[: a.threads]
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "3",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    import numpy as np
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    length = max(16, a.prompt) + a.new
    llm = LLM(a.model, dtype="bfloat16", max_model_len=length, enable_prefix_caching=False, seed=0)
    load_s = time.perf_counter() - started
    engine, generator = llm.llm_engine, np.random.default_rng(0)
    vocabulary = llm.model_config.get_vocab_size()

    def run(batch: int, prompt: int, new: int) -> dict[str, Any]:
        options = SamplingParams(max_tokens=new, min_tokens=new, ignore_eos=True, temperature=0, detokenize=False)
        prompts = generator.integers(10, vocabulary, (batch, prompt)).tolist()
        got, begin = dict.fromkeys(map(str, range(batch)), 0), time.perf_counter()
        times: list[float] = []
        for name, ids in zip(got, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": ids}, options)
        while engine.has_unfinished_requests():
            for output in engine.step():
                got[output.request_id] = len(output.outputs[0].token_ids)
            now = time.perf_counter() - begin
            times += [now] * (min(got.values()) - len(times))
        return {"prompt": prompt, "batch": batch, "times": times, "generated": sum(got.values())}

    run(1, 16, 1)
    to_first_token_s = time.perf_counter() - started
    runs = [run(a.batch, a.prompt, a.new) for _ in range(a.warmup + a.repeats)][a.warmup :]
    memory_bytes = None  # nearly all of it is the cache's size, which was chosen above
    return {"load_s": load_s, "to_first_token_s": to_first_token_s, "memory_bytes": memory_bytes, "runs": runs}


if __name__ == "__main__":
    main(measure)
