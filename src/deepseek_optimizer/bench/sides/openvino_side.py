"""OpenVINO GenAI as a side; run by the interpreter of its own environment:

    PEER/bin/python openvino_side.py EXPORTED --prompt 512 --new 64 --threads 2

Times are the pipeline's own, which a streamer's clock agrees with to 0.1 ms: a streamer serves one sequence only, and these
any number. A step's time is that of the last sequence.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from foreign import main, resident


def measure(a: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import openvino
    import openvino_genai

    if a.depth:
        raise SystemExit("openvino cannot start with a filled cache")
    base, started = resident("VmRSS"), time.perf_counter()
    pipeline = openvino_genai.LLMPipeline(a.model, "CPU", INFERENCE_NUM_THREADS=a.threads)
    load_s = time.perf_counter() - started
    generator = np.random.default_rng(0)
    vocabulary = json.loads((Path(a.model) / "config.json").read_text(encoding="utf-8"))["vocab_size"]

    def run(batch: int, prompt: int, new: int) -> dict[str, Any]:
        options = openvino_genai.GenerationConfig()
        options.max_new_tokens = options.min_new_tokens = new
        options.ignore_eos, options.do_sample = True, False
        ids = openvino.Tensor(generator.integers(10, vocabulary, (batch, prompt), np.int64))
        mask = openvino.Tensor(np.ones((batch, prompt), np.int64))
        result = pipeline.generate(openvino_genai.TokenizedInputs(ids, mask), options)
        raw = result.perf_metrics.raw_metrics
        first_s = max(raw.m_times_to_first_token) / 1e6  # us
        times = [first_s + (t - raw.m_new_token_times[0]) / 1e3 for t in raw.m_new_token_times]  # ms
        return {"prompt": prompt, "batch": batch, "times": times, "generated": sum(map(len, result.tokens))}

    run(1, 16, 1)
    to_first_token_s = time.perf_counter() - started
    runs = [run(a.batch, a.prompt, a.new) for _ in range(a.warmup + a.repeats)][a.warmup :]
    memory_bytes = resident("VmHWM") - base
    return {"load_s": load_s, "to_first_token_s": to_first_token_s, "memory_bytes": memory_bytes, "runs": runs}


if __name__ == "__main__":
    main(measure)
