"""One side of `spine.py`, in a process of its own: loads, generates, prints its figures as the last line, in JSON.

Both sides import the same modules before the clock and the memory count start, use the same prompts and go through
`model.generate`, greedy, with no end of sequence.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any


def drop_from_page_cache(model: Path) -> None:
    """The model's files leave the page cache, so that loading reads the disk."""
    for path in model.iterdir() if model.is_dir() else [model]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["transformers", "optimised"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--precision")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="drop the model's files from the page cache first")
    parser.add_argument("--load-only", action="store_true", help="stop after the first token")
    print(json.dumps(measure(parser.parse_args())))


def measure(a: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401  both sides import before the clock starts
    from transformers import AutoModelForCausalLM

    from deepseek_optimizer import load_model
    from deepseek_optimizer.bench.process import PeakMemory

    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    if a.cold:
        drop_from_page_cache(a.model)
    memory, started = PeakMemory(), time.perf_counter()
    if a.side == "transformers":
        model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.bfloat16)
    else:
        model = load_model(a.model, threads=a.threads, **({"precision": a.precision} if a.precision else {}))
    loaded = time.perf_counter() - started
    model.generation_config.eos_token_id = None

    def generate(tokens: int, new: int) -> float:
        prompt = torch.randint(10, 8000, (1, tokens))
        begin = time.perf_counter()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)
        return time.perf_counter() - begin

    generate(16, 1)
    result: dict[str, Any] = {"load_s": loaded, "to_first_token_s": time.perf_counter() - started}
    if not a.load_only:
        generate(a.prompt, 4)
        prefill = [generate(a.prompt, 1) for _ in range(a.repeat)]
        decode = [(generate(a.prompt, a.new + 1) - statistics.median(prefill)) / a.new for _ in range(a.repeat)]
        result["prefill_tok_s"] = a.prompt / statistics.median(prefill)
        result["decode_tok_s"] = 1 / statistics.median(decode)
    result["memory_bytes"] = memory.bytes()
    return result


if __name__ == "__main__":
    main()
