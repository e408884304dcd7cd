"""A model loaded, run and dropped again and again, and run by many threads at once: `python -m benchmarks.cycles`.

    python -m benchmarks.cycles [--model PATH] [--cycles 200] [--threads 8] [--rounds 20]

Every cycle must give the same tokens, and resident memory must be flat over the last two thirds of them. Threads share one
model while garbage is collected all the time: each must get the tokens that it gets alone, and so must a forked child. Prints
what was found, and ends with status 1 on any failure.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from deepseek_optimizer import load_model

GROWTH = 0.02  # of resident memory, over the last two thirds of the cycles
FORMATS: tuple[dict[str, Any], ...] = ({"precision": "int8"}, {"precision": "int4", "kv_cache": "int8"}, {"precision": "bf16"})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="of any known family; default: a tiny Llama of random weights")
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20, help="texts that each thread generates")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = a.model or tiny(Path(folder))
        failures = cycles(path, a.cycles) + threads(path, a.threads, a.rounds) + forked(path)
    for failure in failures:
        print(f"FAILED {failure}")
    print("failed" if failures else "passed")
    raise SystemExit(bool(failures))


def tiny(folder: Path) -> Path:
    """A Llama of two layers of width 64 with random weights, saved in `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, max_position_embeddings=512, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def generated(model: Any, seed: int, new: int = 12) -> list[int]:
    """Greedy tokens behind a prompt that follows from `seed`."""
    length = 5 + seed * 7 % 60
    ids = torch.randint(3, 250, (1, length), generator=torch.Generator().manual_seed(seed), dtype=torch.int64)
    found: list[int] = model.generate(ids, max_new_tokens=new, do_sample=False)[0, length:].tolist()
    return found


def cycles(path: Path, count: int) -> list[str]:
    """Loads, runs and drops the model in each format in turn."""
    failures, resident = [], []
    first: dict[int, list[int]] = {}
    for i in range(count):
        form = i % len(FORMATS)
        model = load_model(path, **FORMATS[form])
        tokens = generated(model, 1)
        if tokens != first.setdefault(form, tokens):
            failures.append(f"cycle {i}: other tokens than in the first one of {FORMATS[form]}")
        del model
        gc.collect()
        resident.append(psutil.Process().memory_info().rss)
    start = resident[count // 3 : count // 3 + 3]
    before, after = max(start), min(resident[-3:])
    told = (f"{size / 1e6:.0f} MB {when}" for size, when in ((before, "after a third"), (after, "at the end")))
    print(f"{count} cycles: {', '.join(told)}")
    if after > before * (1 + GROWTH):
        failures.append(f"resident memory grew from {before / 1e6:.1f} to {after / 1e6:.1f} MB")
    return failures


def threads(path: Path, count: int, rounds: int) -> list[str]:
    """Generates from `count` threads on one model, while another collects garbage."""
    model = load_model(path, **FORMATS[0])
    expected = [generated(model, seed) for seed in range(count)]
    over = threading.Event()

    def collect() -> None:
        while not over.wait(0.001):
            gc.collect(0)

    def work(seed: int) -> int:
        return sum(generated(model, seed) != expected[seed] for _ in range(rounds))

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        with ThreadPoolExecutor(count) as pool:
            wrong = list(pool.map(work, range(count)))
    finally:
        over.set()
        collector.join()
    print(f"{count} threads: {count * rounds} texts, {sum(wrong)} other than alone")
    return [f"thread {seed}: {n} of {rounds} texts are other ones than alone" for seed, n in enumerate(wrong) if n]


def forked(path: Path) -> list[str]:
    """Generates in a child forked after the model had run."""
    model = load_model(path, **FORMATS[0])
    expected = generated(model, 3)
    child = os.fork()
    if not child:
        os._exit(generated(model, 3) != expected)
    _, status = os.waitpid(child, 0)
    print(f"a forked child ended with status {status}")
    return [f"a forked child ended with status {status}"] if status else []


if __name__ == "__main__":
    main()
