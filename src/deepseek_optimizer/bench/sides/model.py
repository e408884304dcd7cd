"""A side that measures a Transformers model, optimized or not:

    python -m deepseek_optimizer.bench.sides.model transformers MODEL --prompt 512 --new 64
    python -m deepseek_optimizer.bench.sides.model optimized MODEL --precision int4 ...

Both go through `model.generate`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..work import Work
from .load import SIDES, load_side


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="bfloat16", help="of the weights in Transformers")
    parser.add_argument("--config", type=json.loads, default={}, help="fields of DeepSeekConfig, as JSON")
    parser.add_argument("--threads", type=int, required=True)
    for name, value in asdict(Work()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=3, help="0: stop after the first token")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--read-seconds", type=float, default=0.0, help="of each measurement of the weights' memory; 0: none")
    parser.add_argument("--cold", action="store_true", help="drop the model's files from the page cache first")
    print(json.dumps(measure(parser.parse_args())))


def measure(a: argparse.Namespace) -> dict[str, Any]:
    from ..runs import repeated

    if a.cold:
        drop_from_page_cache(a.model)
    side = load_side(a.side, a.model, threads=a.threads, dtype=a.dtype, config=a.config)
    list(repeated(side.model, Work(prompt=16, new=1), repeats=1, warmup=0))
    to_first_token_s = time.perf_counter() - side.started
    result: dict[str, Any] = {"load_s": side.load_s, "to_first_token_s": to_first_token_s, "runs": []}
    if a.repeats:
        work = Work(a.prompt, a.new, a.depth, a.batch)
        rates = [own_read_gb_s(side.model, a.threads, a.read_seconds)]
        for run in repeated(side.model, work, repeats=a.repeats, warmup=a.warmup):
            result["runs"].append(asdict(run))
            rates.append(own_read_gb_s(side.model, a.threads, a.read_seconds))
        beside = [max(pair) for pair in pairwise(rates) if None not in pair]
        result["own_read_gb_s"] = statistics.median(beside) if beside else None
    return {**result, "memory_bytes": side.memory.bytes()}


def own_read_gb_s(model: Any, threads: int, seconds: float) -> float | None:
    """How fast these threads can read the model's packed matrices where they are in memory; None for other models."""
    from ..machine_limits import read_regions_gb_s
    from ..memory_traffic import matrix_memory

    regions = matrix_memory(model) if seconds else []
    return read_regions_gb_s(regions, threads, seconds) if regions else None


def drop_from_page_cache(model: Path) -> None:
    """Drops the model's files from the page cache, so that loading reads from disk."""
    for path in model.iterdir() if model.is_dir() else [model]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    main()
